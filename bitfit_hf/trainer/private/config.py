"""[`PrivacyConfig`]: what the user asks of private training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...errors import MissingDependencyError, PrivacyError, collect

ACCOUNTANTS = ("prv", "rdp")


@dataclass(frozen=True)
class PrivacyConfig:
    r"""
    The privacy that a run has to give, for data sets that differ by adding or removing one example.

    Args:
        target_epsilon (`float`, *optional*):
            The ε that the whole run may spend; the noise is calibrated to it. Exactly one of this and
            `noise_multiplier` is given.
        noise_multiplier (`float`, *optional*):
            Standard deviation of the noise, in multiples of `max_grad_norm`. With 0 there is no privacy, and no ε is
            stated.
        target_delta (`float`, *optional*): δ, the probability with which ε may fail; `1 / (10 n)` for `n` examples by
            default. More than `1 / n` is refused.
        max_grad_norm (`float`, *optional*, defaults to 1.0):
            What an example's gradient is clipped to, as the norm over all that is trained.
        accountant (`str`, *optional*, defaults to `"prv"`): Opacus' accountant, `"prv"` (tighter) or `"rdp"`.
        secure_mode (`bool`, *optional*, defaults to `False`):
            Takes the noise and the batches from the operating system's cryptographically secure generator, and not
            from torch's, whose state can be computed from enough of its numbers. A resumed run then draws new ones.
        public_start (`bool`, *optional*, defaults to `False`):
            Says that an adapter which has been trained before has seen no private data in that. Without it one whose
            deltas are not zero is refused: ε counts what this run does and nothing that came before.

    Raises:
        [`PrivacyError`]: A value cannot be; all of them are listed.

    Example:

    ```python
    from bitfit_hf import BitFitCallback, PrivacyConfig, PrivateTrainer

    trainer = PrivateTrainer(model, args, train_dataset=train, callbacks=[BitFitCallback(
        privacy=PrivacyConfig(target_epsilon=3.0, target_delta=1e-5, max_grad_norm=0.1))])
    ```
    """

    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    target_delta: float | None = None
    max_grad_norm: float = 1.0
    accountant: str = "prv"
    secure_mode: bool = False
    public_start: bool = False

    def __post_init__(self) -> None:
        problems = []
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            given = "neither" if self.target_epsilon is None else "both"
            problems.append(f"exactly one of `target_epsilon` and `noise_multiplier` has to be given, got {given}")
        if self.target_epsilon is not None and not (_is_number(self.target_epsilon) and self.target_epsilon > 0):
            problems.append(f"`target_epsilon` must be a positive number, got {self.target_epsilon!r}")
        if self.noise_multiplier is not None and not (
            _is_number(self.noise_multiplier) and self.noise_multiplier >= 0
        ):
            problems.append(f"`noise_multiplier` must be a number, at least 0, got {self.noise_multiplier!r}")
        if self.target_delta is not None and not (_is_number(self.target_delta) and 0 < self.target_delta < 1):
            problems.append(f"`target_delta` must lie between 0 and 1, got {self.target_delta!r}")
        infinite = self.max_grad_norm == math.inf and self.noise_multiplier == 0
        if not infinite and not (_is_number(self.max_grad_norm) and self.max_grad_norm > 0):
            problems.append(
                f"`max_grad_norm` must be a positive number (infinite only with `noise_multiplier=0`), got "
                f"{self.max_grad_norm!r}"
            )
        if self.accountant not in ACCOUNTANTS:
            problems.append(f"`accountant` must be one of {', '.join(ACCOUNTANTS)}, got {self.accountant!r}")
        problems += [
            f"`{name}` must be True or False, got {getattr(self, name)!r}"
            for name in ("secure_mode", "public_start")
            if not isinstance(getattr(self, name), bool)
        ]
        if problems:
            raise PrivacyError(f"PrivacyConfig:{collect(problems)}")

    def delta_for(self, examples: int) -> float:
        """δ for a data set of `examples`.

        Raises:
            [`PrivacyError`]: The one that was given is above `1 / examples`.
        """
        if self.target_delta is None:
            return 1 / (10 * examples)
        if self.target_delta > 1 / examples:
            raise PrivacyError(
                f"target_delta={self.target_delta:g} is above 1/n = {1 / examples:g} of the {examples} training "
                "examples: publishing one example as it is would count as private. Use a tenth of 1/n or less."
            )
        return self.target_delta


def require_opacus() -> None:
    """Raises [`MissingDependencyError`] where Opacus is not installed."""
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError('Private training needs Opacus: `pip install "bitfit-hf[private]"`.') from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
