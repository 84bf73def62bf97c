"""Quantized weights: reading them, and keeping them in a form that can be trained with.

None of the libraries has to be installed. On CPUs with AVX512-BF16, bitsandbytes rearranges a 4-bit weight at the
first forward pass in evaluation mode, for a kernel that has no backward pass: an evaluation followed by more training
ends in an error or loses gradients in silence, saving puts the weight back with its scales in the wrong order, and
PEFT dequantizes it to noise.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def dequantized(module: nn.Module) -> torch.Tensor:
    """The weight of a quantized layer in floating point; the layer is left as it is."""
    if _is_rearranged(module):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*_in_stored_order(module.weight))
    from peft.utils.integrations import dequantize_module_weight

    weight = module.weight
    try:
        return dequantize_module_weight(module)
    finally:
        if module.weight is not weight:  # of 8-bit layers on a CPU PEFT makes another, which has lost its scales
            module.weight = weight


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer keeps its weight quantized, in whichever library's way."""
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    return not weight.dtype.is_floating_point or _poses_as_floating_point(weight)


def unpacked(weight: torch.Tensor) -> torch.Tensor:
    """The values of a weight that torchao has quantized; any other weight as it is."""
    return weight.dequantize() if _poses_as_floating_point(weight) else weight


def _poses_as_floating_point(weight: torch.Tensor) -> bool:
    # torchao keeps quantized weights in tensor subclasses that say they are floating point.
    return type(weight.data).__module__.startswith("torchao")


def plain_linear(layer: nn.Module) -> nn.Linear:
    """A float32 copy of a quantized linear layer, to be trained whole."""
    weight = layer._parameters["weight"]
    assert weight is not None
    whole = unpacked(weight) if weight.dtype.is_floating_point else dequantized(layer)
    bias = layer._parameters.get("bias")
    with torch.device("meta"):
        plain = nn.Linear(whole.shape[1], whole.shape[0], bias=bias is not None)
    plain.weight = nn.Parameter(whole.detach().to(torch.float32, copy=True))
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True))
    return plain


def keep_trainable(model: nn.Module) -> None:
    """Keeps 4-bit weights of bitsandbytes in their stored order; does nothing to other models or on other devices.

    Args:
        model (`nn.Module`): Changed in place: none of its layers rearranges its weight any more.
    """
    layer: Any
    for layer in model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            if _is_rearranged(layer):
                layer.weight.data, layer.weight.quant_state = _in_stored_order(layer.weight)
                layer.quant_state = layer.weight.quant_state


def shared_state(model: nn.Module) -> dict[int, Any]:
    """What quantized layers keep beside their parameters and buffers, by `id`: the memo of a copy that shares it.

    An 8-bit layer of bitsandbytes takes its scales off the weight at its first forward pass. Of two layers that share
    a weight the second would find none, so this has every layer take them now.

    Args:
        model (`nn.Module`): Quantized or not.
    """
    memo: dict[int, Any] = {}
    layer: Any
    for layer in model.modules():
        if getattr(getattr(layer, "weight", None), "CB", None) is not None and hasattr(layer, "init_8bit_state"):
            layer.init_8bit_state()
        if (scales := getattr(layer, "quant_state", None)) is not None:
            memo[id(scales)] = scales
        state = getattr(layer, "state", None)  # has more in it than tensors, what the last call has left among it
        kept = vars(state).values() if hasattr(state, "__dict__") else ()
        memo |= {id(value): value for value in kept if isinstance(value, torch.Tensor)}
    return memo


def _is_rearranged(module: nn.Module) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return getattr(state, "packing_format_for_cpu", False)


def _in_stored_order(weight: Any) -> tuple[torch.Tensor, Any]:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(weight.quant_state)
    state.original_nested = False  # the scales were unpacked along with the weight, and may stay so
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()  # the inverse leaves them transposed
    return data, state
