"""Interleaved timing: the systems take turns, so that a machine whose speed drifts treats all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


class Stepper:
    """A model with its optimizer, ready to take steps."""

    def __init__(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.batch = batch
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4)
        self.device = self.trainable[0].device

    def step(self) -> float:
        """Forward, backward and update; returns seconds."""
        self._wait()
        start = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gradient_bytes(self) -> int:
        """What data-parallel training sends per step: the gradients, each once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.trainable)

    def optimizer_bytes(self) -> int:
        """The optimizer's state after a step."""
        tensors = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def interleave(turns: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of `rounds` turns of each system.

    Args:
        turns (`Mapping[str, Callable]`): System -> takes one turn, returns its seconds.
        rounds (`int`): Counted turns of each.
        warmup (`int`): Turns before, not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(warmup + rounds):
        # Every other round the other way round, so that no system always follows the same one.
        for name in turns if number % 2 else reversed(list(turns)):
            taken = turns[name]()
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def compare(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """A system's time against the reference's, taken in the same rounds.

    Args:
        seconds (`Sequence[float]`): One for each round.
        reference (`Sequence[float]`): Likewise.

    Returns:
        `dict[str, float]`: `seconds`, the median; `ratio`, the median of the rounds' ratios, which cancels what the
            machine did in a round; and `spread`, half the distance between the quartiles of these: what is smaller
            is noise.
    """
    found = ratios(seconds, reference)
    return {
        "seconds": statistics.median(seconds),
        "ratio": found["median"],
        "spread": (found["high"] - found["low"]) / 2,
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """`median`, and the quartiles `low` and `high`."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high}


def ratios(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios, round by round."""
    return quartiles([a / b for a, b in zip(first, second, strict=True)])


def median_seconds(action: Callable[[], Any], times: int, *, undo: Callable[[], Any] | None = None) -> float:
    """Median time of an action, after one run that is not counted.

    Args:
        action (`Callable`): What to time.
        times (`int`): How often.
        undo (`Callable`, *optional*): Called after each run, outside the time.
    """
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
        if undo is not None:
            undo()
    return statistics.median(seconds[1:])
