"""What a stock layer of some kind does with its bias: whether it reads one, in which dtype, along which dimension."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# Layers that add their bias along the second dimension of their output; most add it along the last.
_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def reads_bias(layer: nn.Module, parameter: str) -> bool:
    """Whether the layer's own code reads `parameter`: all do but norms that were defined without a bias."""
    return parameter in layer._parameters


def channel_axis(layer: nn.Module) -> int | None:
    """Dimension of the layer's output along which its bias is added; `None` where the bias is used inside."""
    if isinstance(layer, nn.MultiheadAttention):
        return None
    return 1 if isinstance(layer, _CHANNELS_SECOND) else -1


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype in which a layer without a bias computes."""
    dtype = getattr(layer, "compute_dtype", None)  # bitsandbytes' 4-bit layers
    if dtype is None:
        weight = getattr(layer, "weight", None)
        dtype = weight.dtype if weight is not None and weight.dtype.is_floating_point else torch.float32
    return dtype


def features(layer: nn.Module) -> tuple[int | None, int | None]:
    """Sizes of the layer's input and output, `None` where its kind says none."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, 3 * layer.embed_dim
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.in_channels, layer.out_channels
    return getattr(layer, "in_features", None), getattr(layer, "out_features", None)


def out_features(layer: nn.Module) -> int:
    """How many values a bias of the layer has, also where it has none."""
    return layer.out_features if hasattr(layer, "out_features") else layer.weight.shape[-1]  # type: ignore
