"""Pre-trained models by name."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import quickstart
from transformers import PreTrainedModel, set_seed


def locate(name: str) -> str:
    """Where a model is read from: MiniLM from the demo package where that is installed, any other as it is named."""
    if name == quickstart.DEMO_NAME:
        try:
            importlib.metadata.distribution(quickstart.DEMO_PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            return name
        return quickstart.demo_model()
    return name


def public_name(name: str) -> str:
    """A model's name for records and cards: the last part of a local folder's path."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def new_model(kind: type, name: str, seed: int, **config: Any) -> PreTrainedModel:
    """
    A stock model with a fresh head, the same one for the same seed.

    Args:
        kind (`type`): An auto class, such as `AutoModelForSequenceClassification`.
        name (`str`): Of the pre-trained model.
        seed (`int`): Of the head, and of everything random after it.
        config (`Any`): Changes of the model's configuration, such as `num_labels`.
    """
    set_seed(seed)
    return kind.from_pretrained(locate(name), **config)  # type: ignore[attr-defined]
