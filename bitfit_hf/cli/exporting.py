"""What `bitfit export` writes: a LoRA adapter, a frozen ONNX graph of a base, or one task for ONNX Runtime."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bank.onnx.adapter import export_onnx_adapter
from ..bank.onnx.graphs import export_onnx
from ..delta.lora_export import export_stock
from ..storage.files import CARD_FILE
from .checkpoints import copy_preprocessing, load_model, model_class, preprocessing_folder, read_model_config

if TYPE_CHECKING:
    from ..delta.value import BiasDelta

LABELS_FILE = "labels.json"  # beside an ONNX Runtime adapter, which has no place for them


def write_stock(delta: BiasDelta, base: Any, folder: Path) -> None:
    """A delta as a plain PEFT LoRA adapter."""
    export_stock(delta, folder, base=base)


def write_adapter(delta: BiasDelta, base: Any, folder: Path, name: str) -> None:
    """A delta as an ONNX Runtime adapter, with its graph and the names of its labels."""
    export_onnx_adapter(base.float(), delta, folder, name=re.sub(r"[^A-Za-z0-9._-]", "-", name).strip(".-_") or "task")
    labels = delta.config.id2label
    if labels:
        values = {str(number): label for number, label in labels.items()}
        (folder / LABELS_FILE).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_graph(
    name: str,
    folder: Path,
    *,
    int8: bool,
    int8_all: bool,
    add_missing_biases: bool,
    revision: str | None,
    token: str | None,
) -> str:
    """The backbone of a base as one graph for all of its tasks; returns its class."""
    config = read_model_config(name, revision=revision, token=token)
    model: Any = load_model(name, model_class(config, name), revision=revision, token=token)
    if model.dtype is not torch.float32:
        model = model.float()
    export_onnx(model, folder, int8=int8, int8_all=int8_all, add_missing_biases=add_missing_biases)
    copy_preprocessing([preprocessing_folder(name, revision=revision, token=token)], folder)
    return type(model.base_model).__name__


def copy_companions(delta: Path, base: Path | None, folder: Path) -> None:
    """Copies the card of a delta, and its tokenizer files or else its base's."""
    copy_preprocessing([delta, *([] if base is None else [base])], folder)
    if (delta / CARD_FILE).is_file() and not (folder / CARD_FILE).exists():
        shutil.copyfile(delta / CARD_FILE, folder / CARD_FILE)
