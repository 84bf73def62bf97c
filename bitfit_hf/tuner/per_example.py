"""Per-example gradients of deltas and head, left by one backward pass over a batch.

A delta that is expanded to one row per example has, as the gradient of a row, the gradient of that example. The rows
need not exist: a tuned layer computes with `b_0 + δ` as ever, and an identity behind it reduces the gradient of its
output over everything but example and channel. So the forward pass is the non-private one, bit by bit, and nothing is
stored for the biases. A head's leaf keeps its input, as it does without privacy, for the gradient of its weight, which
is left as an [`OuterProduct`] where each example uses the weight once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedLayerError
from .head import BitFitHead
from .layer import BitFitLayer
from .layer_kinds import channel_axis
from .quantized_layer import is_bitsandbytes
from .reading import stock_class

HEAD_KINDS = (nn.Linear, Conv1D, nn.LayerNorm)


class OuterProduct:
    """Per-example gradients `rows[i] ⊗ columns[i]` of a weight, not multiplied out.

    A pooler's weight has more elements than all biases of a small model together: one such matrix for each example
    would take longer than the backward pass.

    Args:
        rows (`torch.Tensor` of shape `(batch, r)`), columns (`torch.Tensor` of shape `(batch, c)`): The factors.
    """

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self.rows, self.columns = rows, columns

    def dense(self) -> torch.Tensor:
        """The gradients, `(batch, r, c)`."""
        return self.rows[:, :, None] * self.columns[:, None, :]


Gradient = torch.Tensor | OuterProduct


def dense(gradient: Gradient) -> torch.Tensor:
    """Per-example gradients of whichever form as a tensor, `(batch, *parameter.shape)`."""
    return gradient.dense() if isinstance(gradient, OuterProduct) else gradient


class PerExample:
    """While it is open, a forward and backward pass of the model leave per-example gradients here, and in no `.grad`.

    Args:
        model (`nn.Module`): With one BitFit adapter active.
        batch (`int`): Number of examples in the batch, the first dimension of every input.
        rows (`dict[nn.Module, tuple[int, bool]]`, *optional*):
            For each tuned part, how many consecutive rows of its output are one example's, and whether all examples
            share what it computes. Without it one row each is assumed; the shapes are checked in any case.

    Attributes:
        gradients (`dict[nn.Parameter, torch.Tensor | OuterProduct]`): Of shape `(batch, *parameter.shape)`, float32.
    """

    def __init__(self, model: nn.Module, batch: int, rows: dict[nn.Module, tuple[int, bool]] | None = None) -> None:
        self.batch = batch
        self.gradients: dict[nn.Parameter, Gradient] = {}
        self._rows = rows or {}
        self._parts = parts_of(model)

    def __enter__(self) -> PerExample:
        for part in self._parts:
            part._tape = self
        return self

    def __exit__(self, *exception: object) -> None:
        for part in self._parts:
            part._tape = None

    def add(self, parameter: nn.Parameter, gradient: Gradient) -> None:
        """Adds what one use of a parameter contributes: a layer may run several times, and a delta may be tied."""
        if parameter in self.gradients:
            gradient = dense(self.gradients[parameter]) + dense(gradient)
        self.gradients[parameter] = gradient

    # --- tuned layers ---

    def shared_input(self, layer: BitFitLayer, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """One copy per example of an input that all share (DeBERTa's relative positions), as a view."""
        if self._rows.get(layer, (1, False))[1]:
            first = args[0]
            if first.dim() < 3 or first.shape[0] != 1:
                raise _unsupported(layer, f"computes one table of {_shape(first)} for all examples")
            return (first.expand(self.batch, *first.shape[1:]), *args[1:])
        return args

    def tap(self, layer: BitFitLayer, output: torch.Tensor) -> torch.Tensor:
        """The output of a tuned layer, whose gradient is noted per example for the deltas of its `bias`."""
        axis = channel_axis(layer.base_layer)
        each, shared = self._rows.get(layer, (1, False))
        expected = self.batch * (1 if shared else each)
        if axis is None or not isinstance(output, torch.Tensor) or output.shape[0] != expected:
            raise _unsupported(layer, f"computes {_shape(output)} for a batch of {self.batch}")
        for name in layer.adapters_in_use:
            deltas = layer._deltas("bias")
            if name in deltas and deltas[name].requires_grad:
                output = _Tap.apply(output, deltas[name], self, layer._index("bias", name), axis)
        return output

    def vector(self, layer: BitFitLayer, parameter: str, value: torch.Tensor) -> VectorPerExample:
        """A free-standing bias that the layer's own code indexes with `[None, None, :]`, one row per example."""
        rows = value.expand(self.batch, -1)
        for name in layer.adapters_in_use:
            deltas = layer._deltas(parameter)
            if name in deltas and deltas[name].requires_grad:
                rows = _Tap.apply(rows, deltas[name], self, layer._index(parameter, name), -1)
        return VectorPerExample(rows, layer, parameter)

    # --- the head ---

    def head(self, leaf: BitFitHead, module: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor:
        """What a leaf of the head computes, with per-example gradients of its weight and bias."""
        (value,) = inputs
        each, shared = self._rows.get(leaf, (1, False))
        if shared or value.shape[0] != each * self.batch:
            raise _unsupported(leaf, f"computes {value.shape[0]} rows for a batch of {self.batch}")
        weight: Any = module.weight
        bias: Any = module.bias
        own = (weight.detach(), None if bias is None else bias.detach())
        if isinstance(module, nn.Linear):
            result = functional.linear(value, *own)
        elif isinstance(module, Conv1D):
            result = functional.linear(value, own[0].T, own[1])
        else:
            assert isinstance(module, nn.LayerNorm)
            result = functional.layer_norm(value, module.normalized_shape, *own, module.eps)
        return _HeadTap.apply(result, value.detach(), weight, bias, module, self)


class VectorPerExample:
    """One row per example in place of a vector; it knows the one way of reading that keeps examples apart."""

    def __init__(self, rows: torch.Tensor, layer: BitFitLayer, parameter: str) -> None:
        self._rows, self._layer, self._parameter = rows, layer, parameter

    def __getitem__(self, key: Any) -> torch.Tensor:
        if not (isinstance(key, tuple) and len(key) == 3 and key[:2] == (None, None) and key[2] == slice(None)):
            raise _unsupported(self._layer, f"reads its `{self._parameter}` in its own way")
        return self._rows[:, None, :]


def _unsupported(part: Any, what: str) -> UnsupportedLayerError:
    module = part.base_layer if isinstance(part, BitFitLayer) else part.original_module
    return UnsupportedLayerError(
        f"A {stock_class(module).__name__} layer {what}, so its gradient has no part per example, and it cannot be "
        "trained privately. Leave it out with `exclude_modules`, or with other `bias_terms`."
    )


def _shape(output: Any) -> str:
    return str(tuple(output.shape)) if isinstance(output, torch.Tensor) else type(output).__name__


def _per_example(gradient: torch.Tensor, batch: int, axis: int) -> torch.Tensor:
    """`(batch, positions, channels)` of a gradient whose first dimension holds the examples, each's rows together."""
    moved = gradient.movedim(axis, -1)
    return moved.reshape(batch, -1, moved.shape[-1])


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Any, delta: Any, tape: Any, index: Any, axis: int) -> Any:
        ctx.tape, ctx.delta, ctx.index, ctx.axis = tape, delta, index, axis
        # The same storage as no view in autograd's eyes: DeBERTa writes into such an output.
        return output.data

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        rows = _per_example(gradient, ctx.tape.batch, ctx.axis).sum(1, dtype=torch.float32)
        rows = rows if ctx.index is None else rows[:, ctx.index]
        ctx.tape.add(ctx.delta, rows.view(-1, *ctx.delta.shape))
        return gradient, None, None, None, None


class _HeadTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Any, value: Any, weight: Any, bias: Any, module: Any, tape: Any) -> Any:
        ctx.save_for_backward(value)
        ctx.weight, ctx.bias, ctx.module, ctx.tape = weight, bias, module, tape
        return result.data

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        module, tape = ctx.module, ctx.tape
        outputs = _per_example(gradient.float(), tape.batch, -1)
        if isinstance(module, nn.LayerNorm):
            shape = (tape.batch, -1, *module.normalized_shape)
            normed = functional.layer_norm(value.float(), module.normalized_shape, eps=module.eps)
            outputs = gradient.float().reshape(shape)
            tape.add(ctx.weight, (outputs * normed.reshape(shape)).sum(1))
        else:
            inputs = _per_example(value.float(), tape.batch, -1)
            rows, columns = (outputs, inputs) if isinstance(module, nn.Linear) else (inputs, outputs)
            if rows.shape[1] == 1:
                tape.add(ctx.weight, OuterProduct(rows[:, 0], columns[:, 0]))
            else:
                tape.add(ctx.weight, torch.einsum("bpr,bpc->brc", rows, columns))
        if ctx.bias is not None:
            tape.add(ctx.bias, outputs.sum(1))
        return gradient, None, None, None, None, None


# --- which parts, and what they make of a batch ---


def parts_of(model: nn.Module) -> list[Any]:
    """The tuned layers and the leaves of the head."""
    return [module for module in model.modules() if isinstance(module, (BitFitLayer, BitFitHead))]


def unsupported_parts(model: nn.Module) -> Iterator[str]:
    """What in the model has trained parameters without per-example gradients, one line each."""
    for path, module in model.named_modules():
        if isinstance(module, BitFitHead):
            if type(module) is not BitFitHead:
                yield f"{path} ({type(module).__name__}): rows of added tokens and single parameters of a head"
                continue
            for copy in module.modules_to_save.values():
                trained = any(parameter.requires_grad for parameter in copy.parameters())
                if trained and type(copy) not in HEAD_KINDS:
                    yield f"{path}: a {type(copy).__name__} in the head (Linear, Conv1D and LayerNorm can be trained)"
        elif isinstance(module, BitFitLayer):
            if is_bitsandbytes(module.base_layer):
                yield f"{path}: a layer of bitsandbytes, which casts the bias that it reads in its own way"
            elif isinstance(module.base_layer, nn.MultiheadAttention):
                yield f"{path}: a MultiheadAttention, which reads its biases inside"


@contextmanager
def recorded_outputs(model: nn.Module) -> Iterator[dict[nn.Module, list[torch.Tensor]]]:
    """The outputs of all tuned parts while the context lasts, call by call."""
    outputs: dict[nn.Module, list[torch.Tensor]] = {}

    def note(part: nn.Module, _: Any, output: Any) -> None:
        outputs.setdefault(part, []).append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [part.register_forward_hook(note) for part in parts_of(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
