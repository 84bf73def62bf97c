"""[`Ledger`]: what a run has spent, and the key that its batches and noise come from."""

from __future__ import annotations

import functools
import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ...errors import PrivacyError
from ...storage.files import write_bytes
from .checks import LEDGER_FILE
from .config import PrivacyConfig
from .gradients import Noise, generator_noise, secure_noise
from .sampling import draw, keyed_generator


class Ledger:
    """
    Counts updates with Opacus' accountant, and is saved in every checkpoint.

    Batches and noise come from a key that the operating system makes, and never from the Trainer's `seed`, which a
    card quotes: who knows the seed of the noise can subtract it. The key is in the checkpoint, so a resumed run draws
    the batches and the noise that the killed one drew, and a step that is taken twice is one and the same release. It
    is the same only where all is: another batch is drawn where the parameters are others, and other noise made where
    the sum is another one, as after resuming with another schedule. Noise that stands on two sums is subtracted away
    by who sees both. Keep checkpoints to yourself; a push never holds them.

    Several processes draw the same batch, of which each computes its part, and the first makes the noise. In secure
    mode each draws for itself, and takes of that the examples which are its own.

    Args:
        config ([`PrivacyConfig`]): What was asked for.
        examples (`int`): Size of the training data.
        expected_batch_size (`int`): Examples per update, on average, over all processes.
    """

    def __init__(self, config: PrivacyConfig, examples: int, expected_batch_size: int) -> None:
        from opacus.accountants import create_accountant

        if expected_batch_size > examples:
            raise PrivacyError(
                f"An update takes {expected_batch_size} examples on average, and the training data has {examples}. "
                "Lower `per_device_train_batch_size` or `gradient_accumulation_steps`."
            )
        self.config = config
        self.examples = examples
        self.delta = config.delta_for(examples)
        self.expected_batch_size = expected_batch_size
        self.sample_rate = expected_batch_size / examples
        self.noise_multiplier = config.noise_multiplier
        self.accountant = create_accountant(mechanism=config.accountant)
        self._key = secrets.token_bytes(32)
        self._drawn = 0  # batches since the last update
        self.state: Callable[[], bytes] = bytes  # tells one state of the parameters from another

    # --- randomness ---

    def share_key(self) -> None:
        """Gives all processes the key of the first."""
        (self._key,) = broadcast_object_list([self._key])

    def draw(self) -> list[int]:
        """Draws the examples of the next update."""
        generator = None
        if not self.config.secure_mode:
            generator = keyed_generator(self._key, b"batch", f"{self.steps}.{self._drawn}".encode(), self.state())
        self._drawn += 1
        return draw(self.examples, self.sample_rate, generator)

    @property
    def noise(self) -> Noise:
        """What makes noise."""
        if self.config.secure_mode:
            return secure_noise

        def noise(like: torch.Tensor, std: float) -> torch.Tensor:
            values = like.detach().cpu().contiguous().numpy().tobytes()
            generator = keyed_generator(self._key, b"noise", str(self.steps).encode(), values)
            return generator_noise(generator)(like, std)

        return noise

    # --- the budget ---

    @property
    def steps(self) -> int:
        """Updates so far."""
        return sum(steps for _, _, steps in self.accountant.history)

    def plan(self, steps: int) -> None:
        """Settles the noise for a run of `steps` updates more, or checks it where it is settled.

        Raises:
            [`PrivacyError`]: The run cannot meet the ε that was asked for.
        """
        target = self.config.target_epsilon
        if steps <= 0:
            return
        if target is not None and self.noise_multiplier is None:
            self.noise_multiplier = self._calibrated(target, steps)
        # Also without a target: an ε that cannot be computed is told now, and not after the training.
        planned = self._epsilon_of(self._history_after(steps))
        if target is not None and planned is not None and planned > target:
            raise PrivacyError(
                f"{steps} updates more would bring ε to {planned:.3f}, above target_epsilon={target:g}: {self.steps} "
                f"updates with noise multiplier {self.noise_multiplier:.4g} are spent already. A budget is for all "
                "training on one model; stop here, or begin again from the base with all the steps planned."
            )

    def _calibrated(self, target: float, steps: int) -> float:
        from opacus.accountants.utils import get_noise_multiplier

        try:
            return get_noise_multiplier(
                target_epsilon=target,
                target_delta=self.delta,
                sample_rate=self.sample_rate,
                steps=steps,
                accountant=self.config.accountant,
            )
        except (ValueError, RuntimeError, MemoryError, OverflowError) as error:
            raise PrivacyError(
                f"No noise meets target_epsilon={target:g} with δ = {self.delta:g} over {steps} updates at a sampling "
                f"rate of {self.sample_rate:.4g} ({type(error).__name__}: {error}). Ask for a larger ε, train fewer "
                "epochs, or use a smaller batch."
            ) from error

    def spend(self) -> None:
        """Counts one update. With no noise there is nothing to count with."""
        self.accountant.step(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)
        self._drawn = 0

    def _history_after(self, steps: int) -> list[tuple[float, float, int]]:
        history = list(self.accountant.history)
        if steps > 0:
            assert self.noise_multiplier is not None
            history.append((self.noise_multiplier, self.sample_rate, steps))
        return history

    def _epsilon_of(self, history: list[tuple[float, float, int]]) -> Any:
        if any(noise == 0 for noise, _, _ in history):
            return None
        if not history:
            return 0.0
        merged: list[tuple[float, float, int]] = []
        for noise, rate, steps in history:
            if merged and merged[-1][:2] == (noise, rate):
                merged[-1] = (noise, rate, merged[-1][2] + steps)
            else:
                merged.append((noise, rate, steps))
        try:
            epsilon = _accounted(self.config.accountant, self.delta, tuple(merged))
        except (ValueError, RuntimeError, MemoryError, OverflowError) as error:  # far too little noise, mostly
            raise PrivacyError(
                f"Opacus' {self.config.accountant} accountant cannot compute the ε of {merged} (noise multiplier, "
                f"sampling rate, updates; {type(error).__name__}: {error}). Use "
                '`accountant="rdp"`, or more noise; 0 states no ε.'
            ) from error
        if not math.isfinite(epsilon):
            raise PrivacyError(
                f"Opacus' {self.config.accountant} accountant gives no finite ε for {merged}. Use "
                '`accountant="rdp"`, or more noise.'
            )
        return epsilon

    def facts(self, *, ahead: int = 0) -> dict[str, Any]:
        """What a card may quote.

        Args:
            ahead (`int`, *optional*, defaults to 0): Updates still to come, as if they were spent.
        """
        known = {
            "epsilon": self._epsilon_of(self._history_after(ahead)),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "steps": self.steps + ahead,
            "max_grad_norm": self.config.max_grad_norm,
            "accountant": self.config.accountant,
        }
        infinite = {name for name, value in known.items() if isinstance(value, float) and not math.isfinite(value)}
        return {name: value for name, value in known.items() if value is not None and name not in infinite}

    # --- checkpoints ---

    def save(self, folder: Path) -> None:
        """Writes the file that a resumed run goes on from."""
        values = {
            "examples": self.examples,
            "sample_rate": self.sample_rate,
            "max_grad_norm": str(self.config.max_grad_norm),
            "accountant": self.config.accountant,
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "history": self.accountant.history,
            "key": None if self.config.secure_mode else self._key.hex(),
        }
        write_bytes(folder / LEDGER_FILE, json.dumps(values, indent=1).encode())

    def load(self, folder: Path, step: int) -> None:
        """Goes on from a checkpoint.

        Args:
            folder (`Path`): The checkpoint.
            step (`int`): Its number of updates.

        Raises:
            [`PrivacyError`]: It is not a checkpoint of this private run.
        """
        path = folder / LEDGER_FILE
        try:
            values = json.loads(path.read_bytes())
            history = [(float(noise), float(rate), int(steps)) for noise, rate, steps in values["history"]]
            noise = float(values["noise_multiplier"])
            own = (self.examples, self.sample_rate, str(self.config.max_grad_norm), self.config.accountant, self.delta)
            saved = tuple(values[name] for name in ("examples", "sample_rate", "max_grad_norm", "accountant", "delta"))
            key = None if values["key"] is None else bytes.fromhex(values["key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrivacyError(
                f"{path} cannot be read ({type(error).__name__}: {error}), so it is not known what was spent up to "
                "this checkpoint. A private run resumes from a checkpoint of a private run only."
            ) from error
        if saved != own:
            raise PrivacyError(
                f"{path} is of another run: examples, sampling rate, clip, accountant and δ were {saved} and are "
                f"{own}. Resume with the same data, batch size and PrivacyConfig."
            )
        if self.noise_multiplier not in (None, noise) or (key is None) != self.config.secure_mode:
            raise PrivacyError(f"{path} was saved with another noise or `secure_mode`. Resume with the same.")
        spent = sum(steps for _, _, steps in history)
        if spent < step or any(steps < 0 or not 0 < rate <= 1 or noise < 0 for noise, rate, steps in history):
            raise PrivacyError(f"{path} counts {spent} updates for a checkpoint of {step}; it has been changed.")
        self.noise_multiplier, self.accountant.history = noise, history
        self._key = key or self._key
        self._drawn = 0


@functools.lru_cache(maxsize=256)  # it takes up to a second, and is asked for at every checkpoint
def _accounted(mechanism: str, delta: float, history: tuple[tuple[float, float, int], ...]) -> float:
    from opacus.accountants import create_accountant

    accountant = create_accountant(mechanism=mechanism)
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta=delta))
