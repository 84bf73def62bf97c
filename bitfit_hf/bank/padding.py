"""[`Padding`]: where padding may stand in a batch of texts, and what of an answer stands for it.

Both are properties of a model class, found out by running it on a short text, alone and padded: which dimensions of
its answer are the sequence (token labels have one, a class has none, attentions have two), and on which side padding
leaves the answer as it was. Absolute positions are counted from the left, so on BERT and GPT-2 padding has to stand on
the right; XLNet sums a text up at its last position, so there it has to stand on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tuner.nested import Path, rebuild, tensors

_MORE = 8  # tokens of padding; so many positions off, no answer stays what it was
# Difference of two answers, as a share of the answer: far above rounding, far below a shift of the positions.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 3e-2

# Answers a text, given as the tokenizer gives it, padded to a length on a side; without these, unpadded.
Answering = Callable[[int | None, str | None], Mapping[str, Any]]


@dataclass(frozen=True)
class Padding:
    """What is known of a model class.

    Args:
        side (`str`, *optional*):
            `"right"` or `"left"`; `None` where padding changes the answer on either side, so that only texts of one
            length may run together.
        axes (`Mapping`): The dimensions of each tensor of an answer that are the sequence, by its path.
    """

    side: str | None
    axes: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    def cut(self, answer: Mapping[str, Any], length: int) -> dict[str, Any]:
        """The answer to a text of `length` tokens, on the CPU, without what stands for padding."""

        def part(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            return _cut(tensor, self.axes.get(path, ()), length, self.side).cpu()

        return rebuild(dict(answer), part)

    @classmethod
    def of(cls, answering: Answering, length: int, *, preferred: str, room: int | None) -> Padding:
        """Finds out what padding does.

        Args:
            answering (`Callable`): Answers a text of `length` tokens.
            length (`int`): Of the text.
            preferred (`str`): The side to take where both are good.
            room (`int`, *optional*): The most tokens that the model takes.
        """
        padded = length + _MORE if room is None else min(length + _MORE, room)
        if padded <= length:
            return cls(None)
        alone = tensors(answering(None, None))
        for side in (preferred, "left" if preferred == "right" else "right"):
            found = tensors(answering(padded, side))
            axes = {path: _grown(tensor, found[path]) for path, tensor in alone.items() if path in found}
            if alone.keys() == found.keys() and all(
                all(tensor.shape[axis] == length for axis in axes[path])
                and _same(_cut(found[path], axes[path], length, side), tensor)
                for path, tensor in alone.items()
            ):
                return cls(side, axes)
        return cls(None)


def _grown(short: torch.Tensor, long: torch.Tensor) -> tuple[int, ...]:
    return tuple(axis for axis, (a, b) in enumerate(zip(short.shape, long.shape, strict=False)) if a != b)


def _cut(tensor: torch.Tensor, axes: tuple[int, ...], length: int, side: str | None) -> torch.Tensor:
    for axis in axes:
        start = tensor.shape[axis] - length if side == "left" else 0
        tensor = tensor.narrow(axis, start, length)
    return tensor


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = _TOLERANCE_HALF if one.dtype in (torch.bfloat16, torch.float16) else _TOLERANCE
    a, b = one.cpu().double(), other.cpu().double()
    return bool((a - b).norm() <= tolerance * b.norm())
