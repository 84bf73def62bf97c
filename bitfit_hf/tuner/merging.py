"""Merging for good: a stock model whose checkpoint loads anywhere."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import MergeError, collect
from ..terms.structure import stock_root, walk
from .state import tuned_layers

# Names under which configurations say whether their projections have biases.
_SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "bias", "use_qkv_bias")


def prepare_merge(model: nn.Module, adapter_names: list[str]) -> None:
    """Makes the stock model one that has the biases which `adapter_names` added.

    A merged checkpoint is loaded by building the model from its configuration, so an added bias survives only where
    the configuration has a switch for it (Llama's `attention_bias` and `mlp_bias`). A switch brings the biases of a
    whole group of layers: those without a delta get one at zero.

    Args:
        model (`nn.Module`): With the adapters injected.
        adapter_names (`list[str]`): What is about to be merged.

    Raises:
        [`MergeError`]: There are added biases that no switch provides for; nothing has been changed.
    """
    added = [
        path
        for path, layer in tuned_layers(model)
        if not layer.merged
        and any(layer.has_adapter(name) for name in adapter_names)
        and layer.base_layer._parameters.get("bias") is None
        and "bias" in layer.bias_parameters
    ]
    if not added:
        return
    config = getattr(model, "config", None)
    provided: dict[str, list[str]] = {}
    for switch in _SWITCHES:
        if getattr(config, switch, None) is False:
            provided[switch] = _brings(model, switch)
    needed = [switch for switch, paths in provided.items() if set(paths) & set(added)]
    covered = {path for switch in needed for path in provided[switch]}
    homeless = sorted(set(added) - covered)
    if homeless:
        raise MergeError(
            f"{type(model).__name__} cannot be merged into a checkpoint of its own class: its configuration has no "
            f"switch for the biases that were added to {len(homeless)} layers:{collect(homeless, limit=4)}\n"
            "Keep the delta separate (save and load it as an adapter), or use `merge_adapter()` to merge in memory."
        )
    for switch in needed:
        setattr(config, switch, True)
    modules = dict(walk(stock_root(model)))
    for path in sorted(covered - set(added)):
        module: Any = modules[path]
        if module._parameters.get("bias") is None:
            weight = module.weight
            # A quantized weight's own dtype says nothing of the bias.
            dtype: Any = weight.dtype if weight.dtype.is_floating_point else model.dtype
            zeros = torch.zeros(module.out_features, dtype=dtype, device=weight.device)
            module._parameters["bias"] = nn.Parameter(zeros, requires_grad=False)


def _brings(model: nn.Module, switch: str) -> list[str]:
    """Paths of the layers that have a bias if the configuration's `switch` is on, and have none now."""
    config: Any = copy.deepcopy(model.config)
    setattr(config, switch, True)
    with torch.device("meta"):
        other = type(model)(config)
    now = dict(walk(stock_root(model)))
    return [
        path
        for path, module in walk(other)
        if module._parameters.get("bias") is not None and path in now and now[path]._parameters.get("bias") is None
    ]
