"""Facts of a card that follow from a delta's configuration and from its training."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from ..config import BitFitConfig
from ..terms import TERMS
from ..terms.tasks import Task, task_named
from ..training_run import TrainingRun, is_known
from .text import code_text, number_text, value_text

# A card names so many labels or modules one by one.
MANY_LABELS = 20

# Names of hyper-parameters in words; others are shown by the name that `TrainingArguments` has.
_WORDS = {
    "learning_rate": "learning rate of the biases",
    "head_learning_rate": "learning rate of the head",
    "lr_scale": "multiples of the learning rate",
    "train_batch_size": "examples per update",
    "num_train_epochs": "epochs planned",
    "max_steps": "updates planned",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up updates",
    "weight_decay": "weight decay (not of the biases)",
    "max_grad_norm": "gradient clipping",
    "optim": "optimizer",
    "mixed_precision": "mixed precision",
}
# What a Trainer counts among the metrics but says nothing about the model.
_NO_METRICS = ("runtime", "model_preparation_time", "jit_compilation_time", "epoch")


def trained_task(config: BitFitConfig) -> Task | None:
    """The task that a delta was trained for, also where only its model's class is known."""
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    name, library = (str(mapping.get(key, "")) for key in ("base_model_class", "parent_library"))
    task = task_named(config.task_type, name, [key.partition(".")[0] for key in config.bias_layout or {}])
    if task is None and name.isidentifier() and library.partition(".")[0] == "transformers":
        return Task((), auto_class=name)
    return task


def selection_lines(config: BitFitConfig) -> list[str]:
    """How the terms were narrowed, a line each."""
    lines = []
    if config.bias_terms != "all":
        terms = [config.bias_terms] if isinstance(config.bias_terms, str) else config.bias_terms
        named = [f"`{term}`" for term in TERMS if term in terms]
        lines.append(f"Selected terms: {', '.join(named)}.")
    layers = config.layers_to_transform
    if layers is not None:
        numbers = [layers] if isinstance(layers, int) else layers
        lines.append(f"Only in the layers {', '.join(map(str, numbers))} (counted from 0).")
    for words, modules in (("Only in", config.target_modules), ("Not in", config.exclude_modules)):
        if modules:
            given = f"those that match `{code_text(modules)}`" if isinstance(modules, str) else names(modules)
            lines.append(f"{words} the modules {given}.")
    pooler = [name for name in config.modules_to_save or () if "pooler" in name.split(".")]
    if pooler:
        lines.append(f"The pooler ({names(pooler)}) was never trained before: it is a part of the task head.")
    return lines


def names(modules: list[str]) -> str:
    shown = ", ".join(f"`{code_text(name)}`" for name in modules[:MANY_LABELS])
    return shown + (f" and {len(modules) - MANY_LABELS} more" if len(modules) > MANY_LABELS else "")


def procedure_lines(run: TrainingRun) -> dict[str, str]:
    """How it was trained: what is said of it, in words."""
    given = run.hyperparameters
    names = [name for name in _WORDS if name in given] + sorted(name for name in given if name not in _WORDS)
    lines = {_words(name, given[name]): value_text(given[name]) for name in names if is_known(given[name])}
    if is_known(run.steps):
        lines["updates"] = value_text(run.steps)
    if is_known(run.epochs):
        lines["epochs"] = value_text(run.epochs)
    if is_known(run.num_examples):
        lines["training examples"] = value_text(run.num_examples)
    if is_known(run.train_loss):
        lines["mean training loss"] = number_text(run.train_loss or 0.0)
    if is_known(run.seconds):
        lines["time"] = f"{run.seconds:.0f} s"
    return lines


def _words(name: str, value: Any) -> str:
    if name == "warmup_steps" and isinstance(value, float) and 0 < value < 1:
        return "warm-up, share of the updates"  # as the Trainer reads a number below one
    return _WORDS.get(name, name)


def is_metric(name: str, value: Any) -> bool:
    """Whether a Trainer's metric says something about the model."""
    return isinstance(value, (int, float)) and is_known(value) and not name.endswith((*_NO_METRICS, "_per_second"))


def commit_name(revision: str | None) -> str | None:
    """`revision` if it can stand in a line of code; it comes from a file."""
    return revision if revision is not None and re.fullmatch(r"[\w./-]{1,128}", revision) else None


def short_digest(prints: dict[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:16]
