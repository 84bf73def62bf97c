"""What the tests of training share: a tiny task, Trainers for it, and what a run leaves in the model and on disk."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, randomize_
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bitfit_hf import BitFitCallback, BitFitConfig
from bitfit_hf.tuner.state import delta_parameters, head_tensors

Tensors = dict[str, torch.Tensor]

IN_PLACE, WRAPPED = "in place", "wrapped"
WAYS = (IN_PLACE, WRAPPED)
_ARGUMENTS = {field.name for field in fields(TrainingArguments)}


def fresh(name: str = "bert-sequence", *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A stock model with random biases, the same on every call."""
    model = randomize_(ARCHITECTURES[name].build(seed), seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def prepared(way: str, config: BitFitConfig | None = None, name: str = "bert-sequence", **options: Any) -> nn.Module:
    """What a user hands to the Trainer: the stock model, or the same wrapped beforehand."""
    model = fresh(name, **options)
    return get_peft_model(model, config or BitFitConfig()) if way == WRAPPED else model


def rows(count: int = 16, name: str = "bert-sequence", *, seed: int = 0) -> list[Tensors]:
    """Examples for the architecture `name`, inputs and labels."""
    arch = ARCHITECTURES[name]
    batch = {**arch.inputs(count, seed), **arch.labels(count, seed)}
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def arguments(folder: str | Path, **values: Any) -> TrainingArguments:
    """Quiet arguments for the CPU that log every step and save nothing unless told to."""
    defaults = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "steps" if "save_steps" in values else "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **values})


def in_order() -> dict[str, Any]:
    """Arguments with which the Trainer takes the examples in their order, in this version of transformers."""
    assert "train_sampling_strategy" in _ARGUMENTS
    return {"train_sampling_strategy": "sequential"}


def trainer_for(
    model: nn.Module | None,
    folder: str | Path,
    *callbacks: Any,
    train: list[Tensors] | None = None,
    args: TrainingArguments | None = None,
    options: Mapping[str, Any] | None = None,
    **values: Any,
) -> Trainer:
    """An unmodified Trainer.

    Args:
        model (`nn.Module`): Its model.
        folder (`str` or `Path`): Its output folder.
        callbacks: Passed on; a plain [`BitFitCallback`] if there are none.
        train (`list`, *optional*): Its data, for training and evaluation.
        args (`TrainingArguments`, *optional*): Instead of those made from `values`.
        options (`Mapping`, *optional*): More of the Trainer's own parameters.
        values: Of the arguments, see [`arguments`].
    """
    return stock_trainer(
        model,
        args or arguments(folder, **values),
        train=train,
        callbacks=list(callbacks) or [BitFitCallback()],
        **dict(options or {}),
    )


def stock_trainer(
    model: nn.Module | None, args: TrainingArguments, *, train: list[Tensors] | None = None, **options: Any
) -> Trainer:
    """A Trainer that this library has no part in."""
    data = rows() if train is None else train
    trainer = Trainer(model=model, args=args, **{"train_dataset": data, "eval_dataset": data, **options})
    trainer.remove_callback(PrinterCallback)
    _spare_the_garbage_collector()
    return trainer


@cache
def _spare_the_garbage_collector() -> None:
    # Every `train` collects garbage, which takes longer than the training if all that was imported is looked at.
    gc.collect()
    gc.freeze()


def losses(trainer: Trainer) -> list[float]:
    """The loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tuned(model: nn.Module, adapter_name: str = "default") -> Tensors:
    """Copies of an adapter's deltas and head, by stock name."""
    live = {**delta_parameters(model, adapter_name), **head_tensors(model, adapter_name)}
    assert live, f"no adapter {adapter_name!r}"
    return {name: tensor.detach().clone() for name, tensor in live.items()}


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether names and bits are equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def furthest(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between equally named tensors."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def moved(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether every delta has left zero."""
    return all(bool(delta.any()) for delta in delta_parameters(model, adapter_name).values())


def saved(folder: str | Path, file: str = "adapter_model.safetensors") -> Tensors:
    """The tensors of a delta on disk, by stock name."""
    return {name.removeprefix("base_model.model."): t for name, t in load_file(Path(folder) / file).items()}


def files(folder: str | Path) -> dict[str, int]:
    """Sizes of the files below a folder."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}


class Recorder(TrainerCallback):
    """Writes down the learning rates that the optimizer's groups have at every step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
