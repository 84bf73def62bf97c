"""Diff pruning (Guo, Rush and Kim, 2021, "Parameter-Efficient Transfer Learning with Diff Pruning"), unstructured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .base import Folder, Method, body_parameters, train_head_only
from .sparse import load_sparse, parametrizations, parametrize_, save_sparse

# The stretched interval (l, r) of the gates; the paper's l = -1.5 and r = 1.5.
LOWER, UPPER = -1.5, 1.5
# Uniform noise is kept away from 0 and 1, where its logit is infinite; as in the authors' code.
_MARGIN = 1e-4


class _SampledGates(torch.autograd.Function):
    """`W_0 + z * w` with a fresh sample of the gates, keeping z and w only: the intermediate steps are as large."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, difference: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(alpha).uniform_(_MARGIN, 1 - _MARGIN).logit_()
        gates = noise.add_(alpha).sigmoid_().mul_(UPPER - LOWER).add_(LOWER).clamp_(0, 1)
        ctx.save_for_backward(gates, difference)
        return torch.addcmul(tensor.float(), gates, difference).to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        gates, difference = ctx.saved_tensors
        gradient = gradient.float()
        concrete = (gates - LOWER).div_(UPPER - LOWER)
        slope = concrete.mul_(1 - concrete).mul_(UPPER - LOWER)
        slope.mul_((gates > 0) & (gates < 1))  # clamped gates do not move
        return None, gradient * gates, slope.mul_(difference).mul_(gradient)


class GatedDifference(nn.Module):
    """
    A parametrization `W_0 + z * w`: a trained difference under gates, then under a fixed mask.

    With u uniform on (0, 1), a gate is the hard-concrete `z = min(1, max(0, σ(log u − log(1 − u) + α)(r − l) + l))`
    (after Louizos et al., 2018), drawn anew in every forward pass of training. Evaluation takes u = 1/2 and of that,
    before the projection, what projection would keep.

    Args:
        tensor (`torch.Tensor`): W_0, frozen.
        alpha (`float`): Where the gates' α start.
    """

    mask: torch.Tensor
    projected: torch.Tensor

    def __init__(self, tensor: torch.Tensor, alpha: float) -> None:
        super().__init__()
        zeros = torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False)
        self.difference = nn.Parameter(zeros)
        self.alpha = nn.Parameter(torch.full_like(zeros, alpha))
        self.register_buffer("mask", torch.zeros_like(zeros, dtype=torch.bool))
        # In a checkpoint, so that a resumed run goes on in its phase.
        self.register_buffer("projected", torch.tensor(False, device=tensor.device))
        self.gated = True  # what `projected` says, without a look at the device in every forward pass
        self.threshold = 0.0

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.gated and self.training:
            return _SampledGates.apply(tensor, self.difference, self.alpha)
        if self.gated:
            difference = self.expected()
            difference.mul_(difference.abs() >= self.threshold)
        else:
            difference = self.difference * self.mask
        return (tensor.float() + difference).to(tensor.dtype)

    @torch.no_grad()
    def expected(self) -> torch.Tensor:
        """The difference under the gates at u = 1/2."""
        gates = self.alpha.sigmoid().mul_(UPPER - LOWER).add_(LOWER).clamp_(0, 1)
        return gates.mul_(self.difference)

    @torch.no_grad()
    def add_penalty(self, coefficient: float) -> None:
        """Adds the gradient of `coefficient * Σ σ(α − log(−l / r))`, the expected number of open gates, to α's."""
        probability = torch.sigmoid(self.alpha - math.log(-LOWER / UPPER))
        gradient = probability.mul_(1 - probability).mul_(coefficient)
        self.alpha.grad = gradient if self.alpha.grad is None else self.alpha.grad.add_(gradient)

    @torch.no_grad()
    def project(self, mask: torch.Tensor) -> None:
        """Fixes the mask and ends the gates."""
        self.difference.copy_(self.expected() * mask)
        self.mask.copy_(mask)
        self.projected.fill_(True)
        self.follow()

    def follow(self) -> None:
        """Takes up the phase that `projected` says, after a checkpoint was loaded."""
        self.gated = not bool(self.projected)
        self.alpha.requires_grad_(self.gated)


class DiffPruning(Method):
    """
    Learns a difference to the pre-trained weights that is zero almost everywhere.

    In the first part of a run all of the body has a difference under gates, whose expected number is penalised. Then
    the differences of the largest magnitude over the whole body are kept, an exact number of them, and tuned with that
    mask fixed. As with the authors each part goes through a whole schedule of learning rates, warm-up and decay; here
    all of it happens within one run of an unmodified `Trainer`, whose steps the parts share. The gradient of the
    penalty is known in closed form and added in a callback, after clipping; the loss stays the model's. Evaluations in
    the first part are of what projection would keep at that moment.

    Constants, from the authors' code and its script for SST-2: α starts at 5 and has a rate of 0.1, the penalty is
    1.25e-7 for each expected gate, the interval (−1.5, 1.5), the difference's rate 1e-5 on BERT-large, 0.5 % kept.
    Gates need thousands of steps to close at that penalty; in shorter runs it is above all the projection that prunes.
    Memory: two trained tensors for each of the body's, with their gradients and moments.

    Args:
        sparsity (`float`, *optional*, defaults to 0.005): Share of the body's parameters that is kept.
        penalty (`float`, *optional*, defaults to 1.25e-7): Coefficient of the expected number of open gates.
        gated_share (`float`, *optional*, defaults to 0.5): Share of the steps before the projection.
        alpha (`float`, *optional*, defaults to 5.0): Where the gates start, nearly all open.
        gate_learning_rate (`float`, *optional*, defaults to 0.1): Of the gates; follows the Trainer's schedule.
        tuned_scale (`float`, *optional*, defaults to 1.0): The rate after the projection, as a multiple of the
            Trainer's. Few values want larger rates than all of them, which shows where steps are few.
        seed (`int`, *optional*): Unused: differences start at zero, and gates draw from the Trainer's random state.
    """

    name = "diff_pruning"
    learning_rates = (1e-5, 2e-5, 5e-5, 1e-4)

    def __init__(
        self,
        sparsity: float = 0.005,
        *,
        penalty: float = 1.25e-7,
        gated_share: float = 0.5,
        alpha: float = 5.0,
        gate_learning_rate: float = 0.1,
        tuned_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        for name, value in (("sparsity", sparsity), ("gated_share", gated_share)):
            if not 0 < value < 1:
                raise ValueError(f"{name}={value} is no share: it must be between 0 and 1, such as 0.005.")
        if not tuned_scale > 0:
            raise ValueError(f"tuned_scale={tuned_scale} would tune nothing: it must be above 0, 1.0 by default.")
        self.sparsity = sparsity
        self.penalty = penalty
        self.gated_share = gated_share
        self.tuned_scale = tuned_scale
        self.alpha = alpha
        self.gate_learning_rate = gate_learning_rate

    def _prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        body = body_parameters(model)
        train_head_only(model)
        parametrize_(model, {name: GatedDifference(tensor, self.alpha) for name, tensor in body.items()})
        return model

    def callbacks(self) -> list[TrainerCallback]:
        return [DiffPruningCallback(self.sparsity, self.penalty, self.gated_share, self.tuned_scale)]

    def trainer_kwargs(self, model: PreTrainedModel | PeftModel, args: TrainingArguments) -> dict[str, Any]:
        """Groups for the optimizer that `args.optim` names: the gates have a rate of their own, the head its decay."""
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        alphas = [gate.alpha for _, _, gate in gates(model)]
        differences = [gate.difference for _, _, gate in gates(model)]
        body = set(map(id, alphas + differences))
        head = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in body]
        groups = [
            {"params": differences, "weight_decay": 0.0},
            {"params": alphas, "weight_decay": 0.0, "lr": self.gate_learning_rate},
            {"params": [parameter for parameter in head if parameter.dim() > 1], "weight_decay": args.weight_decay},
            {"params": [parameter for parameter in head if parameter.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return {"optimizer_cls_and_kwargs": (optimizer, {**kwargs, "params": groups})}

    def _trainable_body(self, model: nn.Module, head: int) -> int:
        return number_kept(model, self.sparsity)

    def save(self, model: nn.Module, folder: Folder) -> int:
        """See [`Method.save`]. Before the projection it writes what projection would keep."""
        if any(gate.gated for _, _, gate in gates(model)):
            masks = masks_of_largest(model, self.sparsity)
            differences = {name: gate.expected() for name, _, gate in gates(model)}
        else:
            masks = {name: gate.mask for name, _, gate in gates(model)}
            differences = {name: gate.difference for name, _, gate in gates(model)}
        values = {}
        for name, tensor, _ in gates(model):
            indices = masks[name].flatten().nonzero().squeeze(1)
            if indices.numel():
                tuned = tensor.detach().flatten()[indices].float() + differences[name].detach().flatten()[indices]
                values[name] = indices, tuned.to(tensor.dtype)
        return save_sparse(values, model, folder)

    def load(self, model: PreTrainedModel, folder: Folder) -> PreTrainedModel:
        load_sparse(model, folder)
        return model


class DiffPruningCallback(TrainerCallback):
    """The phases of [`DiffPruning`] in a run, and the penalty's gradient.

    Args:
        sparsity (`float`): Share of the body's parameters that is kept.
        penalty (`float`): Coefficient of the expected number of open gates.
        gated_share (`float`): Share of the steps before the projection.
        tuned_scale (`float`, *optional*, defaults to 1.0): Of the learning rate after the projection.
    """

    def __init__(self, sparsity: float, penalty: float, gated_share: float, tuned_scale: float = 1.0) -> None:
        self.sparsity = sparsity
        self.penalty = penalty
        self.gated_share = gated_share
        self.tuned_scale = tuned_scale

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                "diff_pruning adds its penalty's gradient after the Trainer has unscaled the gradients, which under "
                "fp16 it does when it clips them: set max_grad_norm (1.0 by default), or use bf16."
            )
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate may have wrapped it
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"diff_pruning goes through the schedule of rates once in each phase, which it cannot do with a "
                f"{type(scheduler).__name__}: set lr_scheduler_type to linear, cosine or constant_with_warmup."
            )
        scheduler.lr_lambdas = [
            in_two_phases(factor, self._gated_steps(state), state.max_steps, self.tuned_scale)
            for factor in scheduler.lr_lambdas
        ]
        for _, _, gate in gates(model):
            gate.follow()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step >= self._gated_steps(state):
            self._project(model, kwargs.get("optimizer"))

    def _gated_steps(self, state: TrainerState) -> int:
        return math.ceil(self.gated_share * state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        for _, _, gate in gates(model):
            if gate.gated:
                gate.add_penalty(self.penalty)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if control.should_evaluate:
            set_threshold(model, self.sparsity)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        set_threshold(model, self.sparsity)  # other callbacks may evaluate here, whatever the Trainer is told to do

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        for _, _, gate in gates(model):  # the best model may be loaded by now, of another phase than the last one's
            gate.follow()
        self._project(model, None)

    def _project(self, model: nn.Module, optimizer: Any) -> None:
        waiting = [(name, gate) for name, _, gate in gates(model) if gate.gated]
        if not waiting:
            return
        masks = masks_of_largest(model, self.sparsity)
        for name, gate in waiting:
            gate.project(masks[name])
            if optimizer is not None:  # the moments are those of another function
                optimizer.state.pop(gate.difference, None)
                optimizer.state.pop(gate.alpha, None)
            gate.alpha.grad = None


def in_two_phases(
    factor: Callable[[float], float], first: int, steps: int, scale: float = 1.0
) -> Callable[[int], float]:
    """A schedule that runs twice, at the pace that each phase needs for the whole of it.

    Args:
        factor (`Callable`): Of the learning rate, by step; made for `steps` steps.
        first (`int`): Steps of the first phase.
        steps (`int`): Of both.
        scale (`float`, *optional*, defaults to 1.0): Of the rate in the second phase.
    """

    def at(step: int) -> float:
        if step < first:
            return factor(step * steps / first)
        return scale * factor((step - first) * steps / max(1, steps - first))

    return at


def gates(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, GatedDifference]]:
    """Yields `(stock name, frozen tensor, its gated difference)`."""
    yield from parametrizations(model, GatedDifference)


def number_kept(model: nn.Module, sparsity: float) -> int:
    """How many scalars a share of the body's is; at least one."""
    return max(1, round(sparsity * sum(tensor.numel() for _, tensor, _ in gates(model))))


def masks_of_largest(model: nn.Module, sparsity: float) -> dict[str, torch.Tensor]:
    """Where the differences of the largest magnitude over the whole body are, exactly [`number_kept`] of them."""
    sizes = {name: tensor.shape for name, tensor, _ in gates(model)}
    magnitudes = torch.cat([gate.expected().abs_().flatten() for _, _, gate in gates(model)])
    flat = torch.zeros_like(magnitudes, dtype=torch.bool)
    flat[magnitudes.topk(number_kept(model, sparsity), sorted=False).indices] = True
    parts = flat.split([shape.numel() for shape in sizes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(sizes.items(), parts)}


def set_threshold(model: nn.Module, sparsity: float) -> None:
    """Makes evaluations leave out what projection would drop now."""
    waiting = [gate for _, _, gate in gates(model) if gate.gated]
    if waiting:
        magnitudes = torch.cat([gate.expected().abs_().flatten() for gate in waiting])
        threshold = float(magnitudes.topk(number_kept(model, sparsity), sorted=False).values.min())
        for gate in waiting:
            gate.threshold = threshold
