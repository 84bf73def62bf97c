"""What the first batch shows, before it is trained on: whether examples mix, and what the loss is a mean over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import PrivacyError
from ...tuner.nested import rows_per_example
from ...tuner.per_example import recorded_outputs

IGNORED = -100  # the label that losses leave out
Loss = Callable[[dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Studied:
    """What is known of a model.

    Args:
        rows (`dict[nn.Module, tuple[int, bool]]`):
            For each tuned part, how many rows of its output are one example's, and whether all share it.
        first_label (`bool`): Whether the label of an example's first position enters the loss, as it does not where
            each position predicts the next.
    """

    rows: dict[nn.Module, tuple[int, bool]]
    first_label: bool

    def counts(self, labels: torch.Tensor) -> torch.Tensor:
        """By how many labels each example enters a loss that is a mean over all labels of the batch, float32."""
        if labels.is_floating_point():
            return torch.ones(labels.shape[0], device=labels.device)  # a mean over equally many numbers per example
        if labels.dim() > 1 and not self.first_label:
            labels = labels[:, 1:]
        return (labels != IGNORED).reshape(labels.shape[0], -1).sum(1).float()

    def scale(self, labels: torch.Tensor) -> torch.Tensor:
        """What makes the gradient of the batch's loss that of each example's own: the mean over its labels.

        A mean over the batch's labels divides each example by what depends on the others. That is undone, and each is
        divided by the number of its own.
        """
        counts = self.counts(labels)
        return torch.where(counts > 0, counts.sum() / counts.clamp(min=1), torch.zeros_like(counts))


def batch_of(inputs: Mapping[str, Any]) -> int:
    """How many examples are in a batch.

    Raises:
        [`PrivacyError`]: It has no labels, or an input does not have the examples in its first dimension.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() == 0:
        raise PrivacyError(
            f"A batch has no tensor `labels` (it has {sorted(inputs)}), so the examples that the loss is a mean over "
            "are not known. Name the column `labels`."
        )
    odd = [
        name
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and (value.dim() == 0 or value.shape[0] != labels.shape[0])
    ]
    if odd:
        raise PrivacyError(f"{', '.join(odd)} of a batch is not one row per example, so examples may mix.")
    return labels.shape[0]


@torch.no_grad()
def study_batch(
    model: nn.Module, inputs: Mapping[str, Any], loss_of: Loss | None = None, *, tolerance: float = 2e-3
) -> Studied:
    """Runs two examples together and each alone, and holds outputs and losses against each other.

    Args:
        model (`nn.Module`): That is trained.
        inputs (`Mapping`): A batch; of one example alone, it stands for both.
        loss_of (`Callable`, *optional*): The loss of inputs; the model's own by default.
        tolerance (`float`, *optional*, defaults to 2e-3): Of losses, and of outputs relative to the largest.

    Raises:
        [`PrivacyError`]: An example's outputs depend on the other, or the loss is no mean over examples or labels.
    """
    loss_of = loss_of or (lambda part: model(**part)["loss"])
    second = min(1, batch_of(inputs) - 1)
    both, losses, outputs = torch.tensor([0, second]), [], []
    with _evaluating(model):
        for examples in (both, both[:1], both[1:]):
            with recorded_outputs(model) as found:
                losses.append(loss_of(_rows_of(inputs, examples)).float())
            outputs.append(found)
        first_label = _first_label_counts(inputs, loss_of)
    together, first, last = outputs
    rows = {part: _rows(part, together[part], first[part], last[part], tolerance) for part in together}
    studied = Studied(rows, first_label)
    counts = studied.counts(_rows_of(inputs, both)["labels"])
    if bool((counts > 0).all()):
        expected = (counts[0] * losses[1] + counts[1] * losses[2]) / counts.sum()
        if not torch.allclose(losses[0], expected, rtol=tolerance, atol=tolerance):
            raise PrivacyError(
                f"The loss of two examples together is {float(losses[0]):.5g}, and the mean of their own is "
                f"{float(expected):.5g}: it is no mean over examples or labels, or the examples mix. Private training "
                "needs a loss that each example enters by itself."
            )
    return studied


@torch.no_grad()
def check_padding(
    model: nn.Module,
    inputs: Mapping[str, Any],
    index: int,
    alone: Mapping[str, Any],
    loss_of: Loss | None = None,
    *,
    tolerance: float = 2e-3,
) -> None:
    """Checks that an example's loss is the same however far its batch is padded, which the others decide.

    Args:
        model (`nn.Module`): That is trained.
        inputs (`Mapping`): A batch.
        index (`int`): Of an example in it.
        alone (`Mapping`): The batch that the collator makes of this example alone. Where it has other values, not only
            less padding, the collator draws some at random, and nothing can be said.
        loss_of (`Callable`, *optional*): The loss of inputs; the model's own by default.
        tolerance (`float`, *optional*, defaults to 2e-3): Of losses.

    Raises:
        [`PrivacyError`]: It is not.
    """
    loss_of = loss_of or (lambda part: model(**part)["loss"])
    padded = _rows_of(inputs, torch.tensor([index]))
    tensors = {name: value for name, value in alone.items() if isinstance(value, torch.Tensor)}
    if all(value.shape == padded[name].shape for name, value in tensors.items()):
        return
    if not all(_is_part_of(value, padded[name]) for name, value in tensors.items()):
        return
    with _evaluating(model):
        own, in_batch = (loss_of(dict(part)).float() for part in (alone, padded))
    if not torch.allclose(own, in_batch, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise PrivacyError(
            f"The loss of an example is {float(own):.5g} alone and {float(in_batch):.5g} when it is padded to the "
            "length of its batch, so it depends on the other examples. Pad on the right with an attention mask that "
            "the model reads, or all examples to one length."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _rows_of(inputs: Mapping[str, Any], examples: torch.Tensor) -> dict[str, Any]:
    return {
        name: value[examples.to(value.device)] if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def _is_part_of(value: torch.Tensor, padded: torch.Tensor) -> bool:
    if value.dim() != padded.dim() or any(own > all_ for own, all_ in zip(value.shape, padded.shape)):
        return False
    left = padded[tuple(slice(0, size) for size in value.shape)]
    right = padded[tuple(slice(whole - size, whole) for size, whole in zip(value.shape, padded.shape))]
    return torch.equal(value, left) or torch.equal(value, right)


def _first_label_counts(inputs: Mapping[str, Any], loss_of: Loss) -> bool:
    """Whether the label of the first position enters the loss, seen with that label alone."""
    labels = inputs["labels"]
    if labels.is_floating_point() or labels.dim() != 2:
        return True
    with_label = (labels != IGNORED).any(1).nonzero()
    one = _rows_of(inputs, with_label.flatten()[:1] if len(with_label) else torch.tensor([0]))

    def enters(position: int) -> bool:
        alone = torch.full_like(one["labels"], IGNORED)
        alone[0, position] = one["labels"][0, position].clamp(min=0)
        loss = loss_of(one | {"labels": alone})
        return bool(loss.isfinite()) and bool(loss != 0)

    last = int((one["labels"][0] != IGNORED).nonzero().flatten()[-1]) if len(with_label) else 0
    if last > 0 and not enters(last):
        raise PrivacyError(
            f"The label of an example's position {last}, its last, does not enter the loss, so the labels that the "
            "loss is a mean over are not known."
        )
    return enters(0)


def _rows(
    part: nn.Module,
    together: list[torch.Tensor],
    first: list[torch.Tensor],
    last: list[torch.Tensor],
    tolerance: float,
) -> tuple[int, bool]:
    name = type(getattr(part, "base_layer", getattr(part, "original_module", part))).__name__
    kinds = set()
    for both, one, two in zip(together, first, last, strict=True):
        if both.shape == one.shape and torch.equal(one, two):
            kinds.add((both.shape[0], True))
            continue
        each = rows_per_example(both.shape[0], 2)
        if each != one.shape[0]:
            raise PrivacyError(
                f"A {name} layer computes {both.shape[0]} rows for two examples, {one.shape[0]} for one."
            )
        alone = torch.cat([one, two])
        scale = float(alone.float().abs().max()) if alone.numel() else 0.0
        if not torch.allclose(both.float(), alone.float(), rtol=0, atol=tolerance * max(scale, 1e-6)):
            raise PrivacyError(
                f"What a {name} layer computes for an example depends on the other examples of the batch, so no "
                "example's contribution can be bounded. Such a model cannot be trained privately."
            )
        kinds.add((each, False))
    if len(kinds) != 1:
        raise PrivacyError(f"A {name} layer is used in several ways, with {sorted(kinds)} rows per example.")
    return kinds.pop()
