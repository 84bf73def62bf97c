"""Facts of a training run, as plain data: what a model card may quote, and nothing else."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

_PACKAGES = ("bitfit-hf", "transformers", "peft", "torch", "accelerate", "datasets", "tokenizers")


@dataclass
class TrainingRun:
    """
    What a Trainer did.

    Args:
        hyperparameters (`dict[str, Any]`, *optional*): By the names of `TrainingArguments`.
        metrics (`dict[str, float]`, *optional*): Of the last evaluation, without the `eval_` in front.
        steps (`int`, *optional*): Optimizer steps.
        epochs (`float`, *optional*): Passes over the data.
        train_loss (`float`, *optional*): Mean over the run.
        seconds (`float`, *optional*): Wall time of `train()`.
        num_examples (`int`, *optional*): Training examples.
        dataset (`str`, *optional*): Name of the training data, where the data set has one.
        versions (`dict[str, str]`, *optional*): Of the packages at work.
    """

    hyperparameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int | None = None
    epochs: float | None = None
    train_loss: float | None = None
    seconds: float | None = None
    num_examples: int | None = None
    dataset: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of those packages of the stack that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
