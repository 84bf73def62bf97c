"""Facts of a training run, as plain data: what a model card may quote, and nothing else."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, collect

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

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
        dataset (`str`, *optional*): The training data's id on the Hub, where it comes from there.
        dataset_config (`str`, *optional*): Which part of that data set.
        eval_dataset (`str`, *optional*), eval_config (`str`, *optional*), eval_split (`str`, *optional*):
            The same of the data that the metrics are about, and the split of it. `""` says that they are about data
            from elsewhere, or about several data sets.
        versions (`dict[str, str]`, *optional*): Of the packages at work.
        privacy (`dict[str, Any]`, *optional*): What a private run has spent: `epsilon` (not where there was no noise),
            `delta`, `noise_multiplier`, `sample_rate`, `steps`, `max_grad_norm`, `accountant`.

    Attributes:
        weights_digest (`str`, *optional*):
            Of the tensors that a file ties these facts to: they speak of those and of no others. Not a fact itself.
        card (`dict[str, Any]`):
            What the user has said for the model card. It goes onto the card and into no other file.
    """

    hyperparameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int | None = None
    epochs: float | None = None
    train_loss: float | None = None
    seconds: float | None = None
    num_examples: int | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    eval_dataset: str | None = None
    eval_config: str | None = None
    eval_split: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights_digest: str | None = None
        self.card: dict[str, Any] = {}

    def add_evaluation(self, values: dict[str, Any], dataloader: Any = None) -> None:
        """Takes in the metrics of an evaluation, perhaps of one data set among several.

        Args:
            values (`dict[str, Any]`): What the Trainer's `evaluate` returns.
            dataloader (`torch.utils.data.DataLoader`, *optional*): Of the evaluation's data.
        """
        found = evaluation_metrics(values)
        if not found:
            return
        data = getattr(dataloader, "dataset", None)
        name, part = dataset_id(data)
        split = getattr(data, "split", None)
        where = (name or "", part, None if name is None or split is None else str(split))
        if not found.keys() >= self.metrics.keys() and where != (self.eval_dataset, self.eval_config, self.eval_split):
            where = ("", None, None)
        self.eval_dataset, self.eval_config, self.eval_split = where
        self.metrics |= found

    def ended(self, state: TrainerState, *, best: bool, private: bool = False) -> None:
        """Takes in how the run went.

        Args:
            state ([`~transformers.TrainerState`]): Of the Trainer, when training ends.
            best (`bool`): Whether the best model is loaded at the end.
            private (`bool`, *optional*, defaults to `False`):
                Leaves out the training loss and the time, both of which tell of the training data.
        """
        self.steps, self.epochs = state.global_step, state.epoch
        if best and state.best_model_checkpoint is not None:
            # The model is the best one again, so the last evaluation is not about it.
            entries = [entry for entry in state.log_history if entry.get("step") == state.best_global_step]
            self.metrics |= {name: value for entry in entries for name, value in evaluation_metrics(entry).items()}
        if private:
            return
        last = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
        self.seconds, self.train_loss = last.get("train_runtime"), last.get("train_loss")

    @classmethod
    def from_dict(cls, values: Any, *, weights_digest: str | None = None) -> TrainingRun:
        """Reads what `adapter_config.json` says of the run; fields of later versions are left out.

        Args:
            values (`dict`): As they stand in the file.
            weights_digest (`str`, *optional*): Of the tensors that the file belongs to.

        Raises:
            [`ConfigError`]: A value has the wrong type.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"`run` must be a mapping, got {values!r:.80} ({type(values).__name__}).")
        known = {item.name for item in fields(cls)}
        run = cls(**{name: value for name, value in values.items() if name in known})
        problems = [
            f"`run.{name}` must be {wanted}" for name, (wanted, good) in _CHECKS.items() if not good(run, name)
        ]
        if problems:
            raise ConfigError(f"adapter_config.json says of the training run what cannot be:{collect(problems)}")
        run.weights_digest = weights_digest
        return run

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON can hold them: without what is not known, and without NaN and Inf."""
        values = {
            name: {k: v for k, v in value.items() if is_known(v)} if isinstance(value, dict) else value
            for name, value in asdict(self).items()
        }
        return {name: value for name, value in values.items() if is_known(value) and value != {}}


def is_known(value: Any) -> bool:
    """Whether a fact is there, and a number that JSON can hold."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(accepts: Callable[[Any], bool]) -> Callable[[TrainingRun, str], bool]:
    def good(run: TrainingRun, name: str) -> bool:
        values = getattr(run, name)
        return isinstance(values, dict) and all(isinstance(k, str) and accepts(v) for k, v in values.items())

    return good


def _optional(accepts: Callable[[Any], bool]) -> Callable[[TrainingRun, str], bool]:
    return lambda run, name: getattr(run, name) is None or accepts(getattr(run, name))


_CHECKS: dict[str, tuple[str, Callable[[TrainingRun, str], bool]]] = {
    "hyperparameters": (
        "a mapping of names to numbers, strings or booleans",
        _mapping(lambda value: isinstance(value, (str, bool)) or _is_number(value)),
    ),
    "metrics": ("a mapping of names to finite numbers", _mapping(_is_number)),
    "steps": ("an integer", _optional(lambda value: isinstance(value, int))),
    "epochs": ("a number", _optional(_is_number)),
    "train_loss": ("a number", _optional(_is_number)),
    "seconds": ("a number", _optional(_is_number)),
    "num_examples": ("an integer", _optional(lambda value: isinstance(value, int))),
    "dataset": ("a string", _optional(lambda value: isinstance(value, str))),
    "dataset_config": ("a string", _optional(lambda value: isinstance(value, str))),
    "eval_dataset": ("a string", _optional(lambda value: isinstance(value, str))),
    "eval_config": ("a string", _optional(lambda value: isinstance(value, str))),
    "eval_split": ("a string", _optional(lambda value: isinstance(value, str))),
    "versions": ("a mapping of names to strings", _mapping(lambda value: isinstance(value, str))),
    "privacy": (
        "a mapping of names to numbers or strings",
        _mapping(lambda value: isinstance(value, str) or _is_number(value)),
    ),
}


def installed_versions() -> dict[str, str]:
    """Versions of Python and of those packages of the stack that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def dataset_id(dataset: Any) -> tuple[str | None, str | None]:
    """Where on the Hub a [`~datasets.Dataset`] comes from, as `(id, config name)`; `(None, None)` for any other data.

    The builder's own name will not do: it is that of a file format, of a folder, or lacks the namespace.
    """
    info = getattr(dataset, "info", None)
    files = getattr(info, "download_checksums", None) or {}
    ids = {match[1] for url in files if (match := re.match(r"hf://datasets/([\w.-]+(?:/[\w.-]+)?)@", str(url)))}
    if len(ids) != 1:
        return None, None
    config = getattr(info, "config_name", None)
    return ids.pop(), config if config != "default" else None


def training_run(
    args: TrainingArguments, dataloader: Any, *, head_learning_rate: float | None, lr_scale: str, dropout: bool
) -> TrainingRun:
    """What is known of a run when it begins.

    Args:
        args ([`~transformers.TrainingArguments`]): Of the Trainer.
        dataloader (`torch.utils.data.DataLoader`): Of the training data.
        head_learning_rate (`float`, *optional*): Learning rate of the head where it has one of its own.
        lr_scale (`str`): The rates by term, in words.
        dropout (`bool`): Whether the model's own dropout is in force.
    """
    dataset = getattr(dataloader, "dataset", None)
    name, part = dataset_id(dataset)
    return TrainingRun(
        hyperparameters={
            "learning_rate": args.learning_rate,
            "head_learning_rate": head_learning_rate,
            "lr_scale": lr_scale,
            "dropout": "the model's own" if dropout else "none",
            "train_batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "num_train_epochs": args.num_train_epochs if args.max_steps <= 0 else None,
            "max_steps": args.max_steps if args.max_steps > 0 else None,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "warmup_steps": args.warmup_steps or None,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "optim": str(getattr(args.optim, "value", args.optim)),
            "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
            "seed": args.seed,
        },
        num_examples=len(dataset) if isinstance(dataset, Sized) else None,
        dataset=name,
        dataset_config=part,
        versions=installed_versions(),
    )


def evaluation_metrics(values: dict[str, Any]) -> dict[str, float]:
    """The metrics among what a Trainer logs of an evaluation, without the `eval_` in front and without speeds."""
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in values.items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith("_per_second")
    }
