"""Telling a run that has failed: predictions that are all the same, numbers that are none, deltas that stand still."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backends.sharded import is_sharded
from ..terms.structure import stock_root
from ..terms.tasks import task_of_class
from .parameter_groups import trainable_deltas

logger = logging.getLogger(__name__)

# Fewer examples may well have one answer.
FEWEST_EXAMPLES = 16
# A bias that was tuned has moved by some thousandths; Adam's first step alone is as long as the learning rate.
SMALLEST_CHANGE = 1e-6

_REMEDY = (
    "Lower the learning rate (or set `lr_scale` for the terms that need it), warm up over the first tenth of the "
    "steps, or train for longer; and see whether the labels are balanced."
)


class Predictions:
    """What a classifier predicts over an evaluation, as far as is needed to see whether it is always the same.

    One of each is kept, so memory does not grow with the data.
    """

    def __init__(self) -> None:
        self.examples = 0
        self._first: Any = None
        self._labels: set[Any] = set()
        self.constant = True
        self.regression = False
        self._range = [math.inf, -math.inf]

    def add(self, logits: torch.Tensor, labels: Any, *, problem_type: str | None) -> None:
        """Takes in a batch.

        Args:
            logits (`torch.Tensor`): Of shape `(examples, labels)` or `(examples, tokens, labels)`.
            labels (`torch.Tensor`, *optional*): The right answers; positions with -100 are no answers.
            problem_type (`str`, *optional*): transformers' name of the loss.
        """
        self.examples += logits.shape[0]
        if isinstance(labels, torch.Tensor) and len(self._labels) < 2:
            self._labels.update(labels[labels != -100].flatten().tolist())
        if logits.shape[-1] == 1:
            self.regression = True
            self._range = [min(self._range[0], float(logits.min())), max(self._range[1], float(logits.max()))]
            return
        if not self.constant:
            return
        answers = logits > 0 if problem_type == "multi_label_classification" else logits.argmax(-1)
        if problem_type != "multi_label_classification":
            if isinstance(labels, torch.Tensor) and labels.shape == answers.shape:
                answers = answers[labels.to(answers.device) != -100]
            answers = answers.flatten()
        if len(answers) == 0:
            return
        if self._first is None:
            self._first = answers[:1].clone()
        self.constant = bool((answers == self._first.to(answers.device)).all())

    def failed(self) -> bool:
        """Whether there were enough examples, with different answers, and all predictions are the same."""
        if self.examples < FEWEST_EXAMPLES or len(self._labels) < 2:
            return False
        if self.regression:
            low, high = self._range
            return math.isfinite(low) and high - low <= 1e-3 * max(abs(low), abs(high))
        return self.constant and self._first is not None

    def told(self) -> str:
        """What was predicted, in words."""
        if self.regression:
            return f"{self._range[0]:.4g} for every example"
        return "the same for every example" if len(self._first.shape) > 1 else f"label {int(self._first[0])} always"


class FailureWatch:
    """Sees when training has failed, and says each kind once per run of one Trainer.

    Nothing is stopped or changed: it is the user's run. What is not finite is refused when it is saved.
    """

    def __init__(self) -> None:
        self._told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
        self._seen: weakref.WeakKeyDictionary[nn.Module, Predictions] = weakref.WeakKeyDictionary()

    def begin(self, model: nn.Module) -> None:
        """A run begins: every kind of failure may be told again."""
        self._told[model] = set()

    @contextmanager
    def watching(self, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Looks at the logits that `model` computes meanwhile for a batch of an evaluation.

        Args:
            model (`nn.Module`): The Trainer's.
            inputs (`Mapping[str, Any]`): The batch.
        """
        root: Any = stock_root(model)
        if not (isinstance(root, PreTrainedModel) and _classifies(root)):
            yield
            return

        def look(_: nn.Module, __: Any, output: Any) -> None:
            logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
            self.saw(model, inputs, logits)

        hook = root.register_forward_hook(look)
        try:
            yield
        finally:
            hook.remove()

    def saw(self, model: nn.Module, inputs: Mapping[str, Any], logits: Any) -> None:
        """Takes in what `model` has computed for a batch of an evaluation.

        Args:
            model (`nn.Module`): The Trainer's.
            inputs (`Mapping[str, Any]`): The batch.
            logits (`torch.Tensor`, *optional*): What came out; anything but a classifier's logits is left alone.
        """
        root: Any = stock_root(model)
        if not (isinstance(root, PreTrainedModel) and _classifies(root)):
            return
        if isinstance(logits, torch.Tensor) and logits.dim() in (2, 3):
            kind = getattr(getattr(root, "config", None), "problem_type", None)
            self._seen.setdefault(model, Predictions()).add(logits.detach(), _labels(inputs), problem_type=kind)

    def forget(self, model: nn.Module) -> None:
        """What was seen last was no evaluation, but predictions that somebody asked for."""
        self._seen.pop(model, None)

    def evaluated(self, model: nn.Module, *, tell: bool) -> None:
        """An evaluation has ended; what is wrong is told in one process alone."""
        seen = self._seen.pop(model, None)
        if not tell or seen is None or not seen.failed():
            return
        if any(bool(parameter.detach().any()) for parameter in trainable_deltas(model).values()):  # it was trained
            self._tell(
                model,
                "constant predictions",
                f"The evaluation's predictions are constant ({seen.told()}, over {seen.examples:,} examples with "
                f"different labels): the model has learned nothing yet, or has collapsed. {_REMEDY}",
            )

    def logged(self, model: nn.Module, logs: Mapping[str, Any]) -> None:
        """The Trainer logs. By default it hides a loss that is no number; the deltas show it."""
        loss = logs.get("loss")
        if isinstance(loss, (int, float)) and not math.isfinite(loss):
            self._tell(model, "not finite", f"The loss is {loss}, not a finite number. {_REMEDY}")
        elif names := not_finite(model):
            self._tell(
                model,
                "not finite",
                f"The delta {names[0]} holds NaN or Inf, so the loss was not finite in some step before (the Trainer "
                f"hides such losses unless `logging_nan_inf_filter=False`). {_REMEDY} Nothing of this run can be "
                "saved from here on.",
            )

    def ended(self, model: nn.Module, *, steps: int) -> None:
        """A run has ended after so many steps: have the deltas moved?"""
        deltas = [parameter.detach() for parameter in trainable_deltas(model).values() if not is_sharded(parameter)]
        if steps and deltas and max(float(delta.abs().max()) for delta in deltas if delta.numel()) < SMALLEST_CHANGE:
            self._tell(
                model,
                "not moved",
                f"After {steps:,} steps no delta has moved by {SMALLEST_CHANGE:g}: the biases are those of the base. "
                "Raise the learning rate (the BitFit paper uses 1e-4 to 1e-3), or train for longer.",
            )

    def _tell(self, model: nn.Module, kind: str, message: str) -> None:
        told = self._told.setdefault(model, set())
        if kind not in told:
            told.add(kind)
            logger.warning(message)


def not_finite(model: nn.Module) -> list[str]:
    """The deltas that hold NaN or Inf, of those whose values are at hand."""
    deltas = {name: p.detach() for name, p in trainable_deltas(model).items() if not is_sharded(p)}
    sums = [delta.sum() for delta in deltas.values()]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):  # one wait for the device, not one for each
        return []
    return [name.partition(":")[2] for name, delta in deltas.items() if not bool(torch.isfinite(delta).all())]


def _classifies(model: PreTrainedModel) -> bool:
    task = task_of_class(type(model).__name__)
    return task is not None and task.new_head


def _labels(inputs: Mapping[str, Any]) -> Any:
    """The right answers of a batch: `labels`, or the one entry that has "label" in its name, as Trainers find them."""
    if "labels" in inputs:
        return inputs["labels"]
    found = [value for name, value in inputs.items() if "label" in name]
    return found[0] if len(found) == 1 else None
