"""Layers that take each example's bias from outside, as they are traced into a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import OnnxExportError
from ...terms import Bias


class GivenBiases(nn.Module):
    """A backbone as a function of its inputs and its examples' biases.

    Args:
        backbone (`nn.Module`): The exporter's own copy; its layers are changed.
        biases (`Mapping[str, Sequence[Bias]]`): What is given from outside, by stock name.
        inputs (`Sequence[str]`): The arguments of the backbone's forward, all `(batch, length)`.

    Raises:
        [`OnnxExportError`]: A bias lies in a layer of which this is not known to be right.
    """

    def __init__(self, backbone: nn.Module, biases: Mapping[str, Sequence[Bias]], inputs: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self._inputs = list(inputs)
        self._layers = [_take_over(backbone, group[0]) for group in biases.values()]

    def forward(
        self, inputs: Sequence[torch.Tensor], rows: torch.Tensor, tables: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The backbone's output tensors, for `inputs`; `rows` and `tables` are as in [`Engine.run`]."""
        for layer, row, table in zip(self._layers, rows.split(1, dim=1), tables, strict=True):
            layer.bias = F.embedding(row, table)
        output: Any = self.backbone(**dict(zip(self._inputs, inputs, strict=True)))
        return tuple(output[name] for name in output_names(output))


def output_names(output: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that a backbone returns."""
    return [name for name, value in output.items() if isinstance(value, torch.Tensor)]


class _GivenBias:
    """The forward of one layer.

    Attributes:
        bias (`torch.Tensor`): The bias of each example, `(batch, 1, width)`.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.bias = torch.empty(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        if isinstance(layer, nn.Linear):
            result = torch.matmul(x, layer.weight.t())
            # A pooler's input is one vector for each example; all else has the length, or positions, in between.
            return result + (self.bias.squeeze(1) if result.dim() == 2 else self.bias)
        result = F.layer_norm(x, layer.normalized_shape, layer.weight, None, layer.eps)
        return result + self.bias


def _take_over(backbone: nn.Module, bias: Bias) -> _GivenBias:
    layer: Any = backbone.get_submodule(bias.module)
    norm = isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1
    if bias.parameter != "bias" or not (norm or type(layer) is nn.Linear):
        raise OnnxExportError(
            f"{bias.name} of {type(backbone).__name__} lies in a {type(layer).__name__}, which cannot be exported to "
            "ONNX with a bias for each example."
        )
    layer.bias = None
    given = _GivenBias(layer)
    layer.forward = given
    return given
