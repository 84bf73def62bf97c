"""Deltas on the command line: reading one, and the base model that belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..delta.value import BiasDelta
from ..storage.fetch import fetch_delta
from .checkpoints import load_model, model_class, read_model_config


def read_delta(name: str, revision: str | None, token: str | None) -> tuple[BiasDelta, Path]:
    """A delta, and the local folder of its files."""
    folder = fetch_delta(name, revision=revision, token=token).folder
    return BiasDelta.from_folder(folder, where=name), folder


def load_base(name: str, delta: BiasDelta, revision: str | None, task_type: str | None, token: str | None) -> Any:
    """The base model for a delta, of the class that has its head."""
    revision = base_revision(name, delta, revision)
    config = read_model_config(name, revision=revision, token=token)
    cls = model_class(config, name, task_type=task_type, delta=delta.config)
    return load_model(name, cls, revision=revision, token=token)


def base_revision(name: str, delta: BiasDelta, revision: str | None) -> str | None:
    """The revision of a base: as the user says, or the one that the delta pins if it names this base."""
    pinned = delta.config.revision if name == delta.config.base_model_name_or_path else None
    return revision or pinned
