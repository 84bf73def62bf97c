"""What would break the guarantee of private training: refused before the first step, each with one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import PrivacyError, TrainerSetupError, collect
from ...tuner.nested import rows_per_example
from ...tuner.per_example import recorded_outputs, unsupported_parts
from ..checks import sharding_engine

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def require_private_trainer(trainer: Any) -> None:
    """Refuses a callback with `privacy=` in any Trainer but [`PrivateTrainer`].

    Raises:
        [`TrainerSetupError`]: It is in another one.
    """
    if not getattr(trainer, "trains_privately", False):
        raise TrainerSetupError(
            "BitFitCallback(privacy=…) needs `bitfit_hf.PrivateTrainer` in place of the Trainer: a stock one cuts the "
            "data into batches of one size, and no ε can be stated for those. Its arguments are the same."
        )


def check_private_setup(trainer: Trainer, *, recompute: bool) -> None:
    """Refuses arguments, data and models with which the guarantee would not hold.

    Raises:
        [`PrivacyError`]: With all that was found.
    """
    model, data = trainer.model, trainer.train_dataset
    assert model is not None
    problems = [*_arguments(trainer.args, recompute)]
    if trainer.compute_loss_func is not None:
        problems.append("`compute_loss_func`: it is not known how such a loss divides by the batch")
    if data is not None and not isinstance(data, Sized):
        problems.append("a training set without a length: the sampling rate needs one")
    problems += [
        f"{path} ({type(module).__name__}): a batch norm mixes the examples of a batch"
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    problems += unsupported_parts(model)
    if problems:
        raise PrivacyError(f"This cannot be trained privately:{collect(problems)}")


def _arguments(args: TrainingArguments, recompute: bool) -> Iterator[str]:
    if args.world_size > 1 or sharding_engine(args) is not None:
        yield "several processes: noise and clipping over processes are not supported; start one"
    if args.label_smoothing_factor:
        yield "`label_smoothing_factor`: the Trainer's smoothed loss is not checked to be a mean over examples"
    if getattr(args, "group_by_length", False) or "length" in str(getattr(args, "train_sampling_strategy", "")):
        yield "batches grouped by length: every example has to be drawn independently of the others"
    if args.fp16:
        yield "`fp16`: its loss scaling skips updates, which tells of the data; use `bf16`"
    if args.torch_compile:
        yield "`torch_compile`: per-example gradients are taken by code that it cannot trace"
    if args.auto_find_batch_size:
        yield "`auto_find_batch_size`: the sampling rate would change while the run is accounted"
    if args.dataloader_num_workers:
        yield "`dataloader_num_workers`: workers draw batches ahead, which a checkpoint could not resume"
    if str(args.include_num_input_tokens_seen) not in ("no", "False"):
        yield "`include_num_input_tokens_seen`: it publishes how long the training examples are"
    if recompute:
        yield "`recompute_activations`: use `gradient_checkpointing` with private training"


def token_counts(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """By how many labels each example enters a loss that is a mean over all labels of the batch, float32."""
    if labels.is_floating_point():
        return torch.ones(labels.shape[0], device=labels.device)  # a mean over equally many numbers per example
    if labels.dim() > 1 and getattr(model, "loss_type", None) == "ForCausalLM":
        labels = labels[:, 1:]  # each position predicts the next
    return (labels != -100).reshape(labels.shape[0], -1).sum(1).float()


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
def study_batch(model: nn.Module, root: nn.Module, inputs: Mapping[str, Any]) -> dict[nn.Module, tuple[int, bool]]:
    """Runs two examples together and each alone, and holds outputs and losses against each other.

    Args:
        model (`nn.Module`): The Trainer's.
        root (`nn.Module`): The stock model in it.
        inputs (`Mapping`): A batch; of one example alone, it stands for both.

    Returns:
        `dict`: For each tuned part, how many rows of its output are one example's, and whether all share it.

    Raises:
        [`PrivacyError`]: An example's outputs depend on the other, or the loss is no mean over examples or labels.
    """
    second = min(1, batch_of(inputs) - 1)
    both, losses, outputs = torch.tensor([0, second]), [], []
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for examples in (both, both[:1], both[1:]):
            part = {
                name: value[examples.to(value.device)] if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
            }
            with recorded_outputs(model) as found:
                losses.append(model(**part)["loss"].float())
            outputs.append(found)
    finally:
        for module in training:
            module.training = True
    low = any(p.is_floating_point() and p.dtype != torch.float32 for p in root.parameters())
    tolerance = 5e-2 if low else 2e-3
    together, first, last = outputs
    rows = {part: _rows(part, together[part], first[part], last[part], tolerance) for part in together}
    counts = token_counts(root, inputs["labels"])[both.to(inputs["labels"].device)]
    if bool((counts > 0).all()):
        expected = (counts[0] * losses[1] + counts[1] * losses[2]) / counts.sum()
        if not torch.allclose(losses[0], expected, rtol=tolerance, atol=tolerance):
            raise PrivacyError(
                f"The loss of two examples together is {float(losses[0]):.5g}, and the mean of their own is "
                f"{float(expected):.5g}: it is no mean over examples or labels, or the examples mix. Private training "
                "needs a loss that each example enters by itself."
            )
    return rows


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
