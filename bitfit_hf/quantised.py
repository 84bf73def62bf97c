"""Quantised weights: reading them, and keeping them in a form that can be trained with.

None of the libraries has to be installed. On CPUs with AVX512-BF16, bitsandbytes rearranges a 4-bit weight at the
first forward pass in evaluation mode, for a kernel that has no backward pass: an evaluation followed by more training
ends in an error or loses gradients in silence, saving puts the weight back with its scales in the wrong order, and
PEFT dequantises it to noise.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def dequantised(module: nn.Module) -> torch.Tensor:
    """The weight of a quantised layer in floating point; the layer is left as it is."""
    if _is_rearranged(module):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*_in_stored_order(module.weight))
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


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
