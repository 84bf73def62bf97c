"""[`Method`]: one way of adapting a pre-trained model to a task, behind which all comparison systems look the same."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from bitfit_hf.storage.files import encode_tensors, read_tensors, write_bytes
from bitfit_hf.terms import head_modules, part_tensors

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class TrainableCount:
    """How much a method trains.

    Args:
        body (`int`): Scalars that a task needs beside the base, without the head.
        head (`int`): Scalars of the task head, which every method trains whole.
        base (`int`): Scalars of the pre-trained model, without the head.
    """

    body: int
    head: int
    base: int

    @property
    def total(self) -> int:
        """Body and head."""
        return self.body + self.head

    @property
    def body_percent(self) -> float:
        """The body in percent of the base: what the paper's tables call % Param."""
        return 100 * self.body / self.base

    @property
    def total_percent(self) -> float:
        """Body and head in percent of the base."""
        return 100 * self.total / self.base


class Method(ABC):
    """
    One way of adapting a pre-trained model to a task.

    An instance belongs to one model. It works with an unmodified `Trainer`:

    ```python
    method = make_method("adapter", seed=1)
    model = method.prepare(AutoModelForSequenceClassification.from_pretrained(name, num_labels=2))
    trainer = Trainer(model, args, callbacks=method.callbacks(), **method.trainer_kwargs(model, args), ...)
    trainer.train()
    method.save(model, folder)
    ```

    Args:
        seed (`int`, *optional*, defaults to 0):
            For what the method draws: new parameters, or which parameters to train. The random state of the process is
            left alone.

    Attributes:
        name (`str`): What [`make_method`] makes it by.
        learning_rates (`tuple[float, ...]`): The grid that its paper searches.
    """

    name: str
    learning_rates: ClassVar[tuple[float, ...]]

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self._sizes: tuple[int, int] | None = None  # of the head and of the base, before the model was changed

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Freezes, wraps or extends a stock model, so that what is left trainable is what the method trains.

        Args:
            model ([`~transformers.PreTrainedModel`]): Stock. It is changed; call this once, before making the Trainer.

        Returns:
            [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: What the Trainer gets.
        """
        head = sum(parameter.numel() for parameter in head_parameters(model).values())
        self._sizes = head, sum(parameter.numel() for parameter in model.parameters()) - head
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self._prepare(model)

    @abstractmethod
    def _prepare(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """What [`prepare`] does, under the method's own random state."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks that the Trainer has to be made with."""
        return []

    def trainer_kwargs(self, model: PreTrainedModel | PeftModel, args: TrainingArguments) -> dict[str, Any]:
        """More keyword arguments that the Trainer has to be made with.

        Args:
            model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): As [`prepare`] returned it.
            args ([`~transformers.TrainingArguments`]): The Trainer's.
        """
        return {}

    def trainable(self, model: nn.Module) -> TrainableCount:
        """Counts what is trained.

        Args:
            model (`torch.nn.Module`): As [`prepare`] returned it.

        Raises:
            `RuntimeError`: The method has prepared no model yet.
        """
        if self._sizes is None:
            raise RuntimeError(f"{self.name} has prepared no model yet, so there is nothing to count: call prepare().")
        head, base = self._sizes
        return TrainableCount(self._trainable_body(model, head), head, base)

    def _trainable_body(self, model: nn.Module, head: int) -> int:
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) - head

    @abstractmethod
    def save(self, model: nn.Module, folder: Folder) -> int:
        """Writes what the task needs beside the base.

        Args:
            model (`torch.nn.Module`): Trained.
            folder (`str` or `os.PathLike`): Made if it is not there; other files in it are left alone.

        Returns:
            `int`: Size in bytes of the files that [`load`] reads.
        """

    @abstractmethod
    def load(self, model: PreTrainedModel, folder: Folder) -> PreTrainedModel | PeftModel:
        """Restores what [`save`] wrote.

        Args:
            model ([`~transformers.PreTrainedModel`]): The stock base with a head of the right shape. It is changed.
            folder (`str` or `os.PathLike`): Where it was saved.

        Returns:
            [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: With the trained model's outputs.
        """


class StoredWhole(Method):
    """A method that stores all that it trains as it is, in one file."""

    _FILE: ClassVar[str]

    def save(self, model: nn.Module, folder: Folder) -> int:
        return save_tensors(trained_tensors(model), folder, self._FILE)

    def load(self, model: PreTrainedModel, folder: Folder) -> PreTrainedModel:
        self.prepare(model)
        load_tensors(trained_tensors(model), folder, self._FILE)
        return model


# --- head and body ---------------------------------------------------------------------------------------------------


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a stock model's task head, by name."""
    return {name: tensor for name, tensor in head_tensors(model).items() if isinstance(tensor, nn.Parameter)}


def body_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a stock model outside its task head, by name, tied ones once."""
    head = set(map(id, head_parameters(model).values()))
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in head}


def train_head_only(model: nn.Module) -> None:
    """Freezes a stock model, but for its task head."""
    model.requires_grad_(False)
    for parameter in head_parameters(model).values():
        parameter.requires_grad_(True)


def head_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the task head, parameters and buffers, live and by name."""
    return part_tensors(model, head_modules(model))


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that require gradients and the head's buffers, live and by name."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **head_tensors(model)}


# --- files -----------------------------------------------------------------------------------------------------------


def save_tensors(tensors: dict[str, torch.Tensor], folder: Folder, file: str) -> int:
    """Writes `tensors` into a safetensors file, in one step, and returns its size in bytes."""
    data = encode_tensors(tensors)
    write_bytes(Path(folder) / file, data)
    return len(data)


def load_tensors(live: dict[str, torch.Tensor], folder: Folder, file: str) -> None:
    """Writes the tensors of a file over `live` ones of the same names.

    Raises:
        `ValueError`: Names or shapes differ.
    """
    saved = read_tensors(Path(folder) / file)
    copy_tensors(live, saved, where=f"{Path(folder) / file}")


def copy_tensors(live: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], *, where: str) -> None:
    """Writes `saved` over `live`, see [`load_tensors`]; `where` is for the message."""
    problems = list(_differences(live, saved))
    if problems:
        raise ValueError(
            f"{where} does not fit the model: {'; '.join(problems)}. Load it onto the base it was trained on, with a "
            "head of the same shape and with the same method."
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


def _differences(live: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> Iterator[str]:
    for name in sorted(live.keys() | saved.keys()):
        if name not in saved:
            yield f"{name} is missing"
        elif name not in live:
            yield f"{name} is not in the model"
        elif live[name].shape != saved[name].shape:
            yield f"{name} has shape {list(saved[name].shape)}, the model's {list(live[name].shape)}"


def size_of(folder: Folder, patterns: Iterable[str]) -> int:
    """Size in bytes of the files in `folder` that match one of `patterns`."""
    return sum(path.stat().st_size for pattern in patterns for path in Path(folder).glob(pattern))
