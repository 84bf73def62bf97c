"""[`BankOutput`]: one answer per example, each in its own task's shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..tuner.nested import SHARED, Path


class BankOutput(Sequence[ModelOutput]):
    """
    What a bank answers: a sequence with one `ModelOutput` per example, of the class that its task's model
    returns, without the batch dimension.

    `out[i].logits` and `out.logits[i]` are the same. As an attribute, a field is a list with one entry per example,
    `None` where the example's task has no such field: `logits` of classifiers, `start_logits` and `end_logits` of
    question answering, `last_hidden_state` of a backbone without a head.

    Args:
        outputs (`Sequence[ModelOutput]`): For each example the output, of the whole batch, that its answer is part of.
        tasks (`Sequence[str]`): Their tasks' names; `None` for the base.
        axes (`Mapping`, *optional*):
            The batch dimension of tensors in the outputs by their path, as far as it is known: `None` where several
            examples come together. Of others it is the first one.
    """

    def __init__(
        self,
        outputs: Sequence[ModelOutput],
        tasks: Sequence[str | None],
        axes: Mapping[Path, int | None] | None = None,
    ) -> None:
        self._outputs = list(outputs)
        self._axes = axes or {}
        self.tasks = list(tasks)

    @cached_property
    def _answers(self) -> list[ModelOutput]:
        # Made when they are asked for: an object for each of a hundred examples takes as long as a layer, and most
        # callers want one field.
        answers = []
        for i, output in enumerate(self._outputs):
            rows = {name: self._row(value, (name,), i) for name, value in output.items()}
            answers.append(type(output)(**{name: row for name, row in rows.items() if row is not None}))
        return answers

    def __len__(self) -> int:
        return len(self._outputs)

    def __iter__(self) -> Iterator[ModelOutput]:
        return iter(self._answers)

    def __getitem__(self, index: Any) -> Any:
        return self._answers[index]

    def __getattr__(self, name: str) -> list[Any]:
        if name.startswith("_"):  # before `__init__` has run, as for a copy
            raise AttributeError(name)
        column = [self._row(output.get(name), (name,), i) for i, output in enumerate(self._outputs)]
        if any(value is not None for value in column):
            return column
        raise AttributeError(f"no example of this batch has {name!r}; there are {self.fields}")

    @property
    def fields(self) -> list[str]:
        """Names of the fields that some example has."""
        return list(dict.fromkeys(name for answer in self._answers for name in answer))

    def __repr__(self) -> str:
        return f"BankOutput({len(self)} examples of {len(set(self.tasks))} tasks, fields {self.fields})"

    def _row(self, value: Any, path: Path, example: int) -> Any:
        """What of an output belongs to one example; `None` where nothing does."""
        if isinstance(value, torch.Tensor):
            axis = self._axes.get(path, 0)
            if axis is None or axis == SHARED or value.dim() <= axis or value.shape[axis] != len(self):
                return None
            return value.select(axis, example)
        if isinstance(value, (tuple, list)):
            rows = [self._row(item, (*path, number), example) for number, item in enumerate(value)]
            return None if any(row is None for row in rows) else tuple(rows)
        return None
