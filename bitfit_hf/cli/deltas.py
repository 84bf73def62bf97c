"""Deltas on the command line: reading one, and the base model that belongs to it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from ..delta.value import BiasDelta
from ..errors import CheckpointError
from ..storage.fetch import fetch_delta
from .checkpoints import load_model, model_class, read_model_config


def read_delta(name: str, revision: str | None, token: str | None) -> tuple[BiasDelta, Path]:
    """A delta, and the local folder of its files."""
    folder = fetch_delta(name, revision=revision, token=token).folder
    return BiasDelta.from_folder(folder, where=name), folder


def load_base(name: str, delta: BiasDelta, revision: str | None, task_type: str | None, token: str | None) -> Any:
    """The base model for a delta, of the class that has its head."""
    revision = base_revision(name, delta, revision)
    if name == delta.config.base_model_name_or_path and Path(name).is_absolute() and not Path(name).is_dir():
        raise CheckpointError(
            f"The delta was trained on the base in {name}, and there is no such folder any more. Say where it is now "
            "with --base, or edit `base_model_name_or_path` in the delta's adapter_config.json; the weights are "
            "compared whatever it says."
        )
    config = read_model_config(name, revision=revision, token=token)
    cls = model_class(config, name, task_type=task_type, delta=delta.config)
    return load_model(name, cls, revision=revision, token=token)


def base_revision(name: str, delta: BiasDelta, revision: str | None) -> str | None:
    """The revision of a base: as the user says, or the one that the delta pins if it names this base."""
    pinned = delta.config.revision if name == delta.config.base_model_name_or_path else None
    return revision or pinned


def tell_if_nothing_changed(delta: BiasDelta, before: torch.nn.Module, base: str, tuned: str) -> None:
    """Says that an extracted delta holds no change.

    Args:
        delta ([`BiasDelta`]): What was extracted.
        before (`torch.nn.Module`): The model before tuning.
        base (`str`), tuned (`str`): What the user calls the two checkpoints.

    Raises:
        [`CheckpointError`]: The head did not change either.
    """
    if any(bool(values.any()) for values in delta.values()):
        return
    known = before.state_dict()
    if all(name in known and torch.equal(known[name].float(), values.float()) for name, values in delta.head.items()):
        raise CheckpointError(
            f"{tuned} is {base}: all weights are equal, so there is no delta to extract. Name the model before tuning "
            "first, then the one after it."
        )
    warnings.warn(f"All biases of {tuned} are those of {base}; the delta holds a head alone.", stacklevel=2)
