"""The recommended setting, in one place: what `bitfit train` does unless the user says otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import ConfigError

BATCH_SIZE = 16
EVAL_BATCH_SIZE = 64
WARMUP = 0.06  # share of the updates
EVAL_SHARE = 0.2
SEED = 42

# BitFit fails on small data mostly for want of updates: three epochs of 400 rows are 75 of them.
UPDATES = 750
FEWEST_EPOCHS, MOST_EPOCHS = 3, 30
# Evaluations without a better one, after which training stops.
PATIENCE = 5


@dataclass(frozen=True)
class Settings:
    """
    How to train, as the user says.

    Args:
        learning_rate (`float`, *optional*): Of the biases, before the scale by term; by default what
            [`~bitfit_hf.recommended_learning_rate`] says of the base.
        head_learning_rate (`float`, *optional*): Of the head; by default the scale says.
        lr_scale (`str`): `"default"`, or `"uniform"` for the paper's one rate.
        dropout (`bool`): Whether the base's own dropout is in force.
        epochs (`float`, *optional*): By default as many as [`default_epochs`] says.
        batch_size (`int`): Examples per update, over all processes.
        max_length (`int`, *optional*): In tokens.
        patience (`int`): Evaluations without a better one before training stops; 0 never stops.
        eval_share (`float`): Of the rows, to evaluate on, where there is no split.
        seed (`int`): Of the split, the head, dropout and the order of the rows.
        terms (`list[str]`, *optional*): Bias terms; all by default.
        add_missing_biases (`bool`): Gives layers without a bias one.
        baseline (`bool`): Also trains the head on a frozen body, to compare with.
        precision (`str`, *optional*): `"fp32"`, `"bf16"` or `"fp16"`; by default bf16 on accelerators that have it.
    """

    learning_rate: float | None = None
    head_learning_rate: float | None = None
    lr_scale: str = "default"
    dropout: bool = False
    epochs: float | None = None
    batch_size: int = BATCH_SIZE
    max_length: int | None = None
    patience: int = PATIENCE
    eval_share: float = EVAL_SHARE
    seed: int = SEED
    terms: tuple[str, ...] = ()
    add_missing_biases: bool = False
    baseline: bool = True
    precision: str | None = None

    def __post_init__(self) -> None:
        wrong = [
            f"{option} {value:g}"
            for option, value in (
                ("--learning-rate", self.learning_rate),
                ("--head-learning-rate", self.head_learning_rate),
                ("--epochs", self.epochs),
            )
            if value is not None and not (math.isfinite(value) and value > 0)
        ]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: this takes a number above 0.")

    def planned_epochs(self, rows: int) -> float:
        """Epochs over so many rows."""
        return self.epochs or default_epochs(rows, self.batch_size)

    def planned_updates(self, rows: int) -> int:
        """Updates over so many rows, if training does not stop early."""
        return math.ceil(self.planned_epochs(rows) * math.ceil(rows / self.batch_size))


def default_epochs(rows: int, batch_size: int) -> int:
    """Enough epochs for [`UPDATES`], between [`FEWEST_EPOCHS`] and [`MOST_EPOCHS`]."""
    updates = math.ceil(rows / batch_size)
    return min(max(math.ceil(UPDATES / updates), FEWEST_EPOCHS), MOST_EPOCHS)
