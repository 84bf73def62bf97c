"""Merging for good: a stock model whose checkpoint loads anywhere."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import nn

from ..errors import AdapterNameError, MergeError, collect
from ..terms.structure import stock_root, walk
from ..terms.token_tensors import keep_rows, restore_rows
from .head import BitFitHead
from .layer import BitFitLayer
from .state import forget_configs, take_out, tuned_layers
from .token_rows import TokenRows

# Names under which configurations say whether their projections have biases.
_SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "bias", "use_qkv_bias")


def merge_and_unload(
    model: nn.Module, *, safe_merge: bool = False, adapter_names: list[str] | None = None
) -> nn.Module:
    """Writes the tuned biases and the head into a model for good, and takes every adapter out of it.

    The same for a model that `get_peft_model` has wrapped, where PEFT's method of that name does it, and for one whose
    adapters are injected in place (by [`BitFitCallback`], `model.add_adapter` or `AutoModelFor….from_pretrained`),
    which has no such method. What comes back is the stock model, whose `save_pretrained` loads anywhere.

    Args:
        model (`nn.Module`): With BitFit adapters, wrapped or in place. It is changed.
        safe_merge (`bool`, *optional*, defaults to `False`): Refuses a result with NaN or Inf.
        adapter_names (`list[str]`, *optional*): What to merge; the active adapters by default.

    Returns:
        `nn.Module`: The stock model.

    Raises:
        [`MergeError`]: There is nothing to merge, the result is not finite, or an added bias has no place in a
            checkpoint of the model's class; nothing has been changed.
        [`AdapterNameError`]: There is no adapter of such a name.

    Example:

    ```python
    trainer.train()
    merge_and_unload(trainer.model).save_pretrained("merged")
    ```
    """
    root = stock_root(model)
    known = list(getattr(root, "peft_config", None) or {})
    if next(tuned_layers(root), None) is None:
        raise MergeError(
            f"{type(root).__name__} has no BitFit adapter. A delta in a file is merged by "
            "`load_delta(base, delta).save_pretrained(folder)`."
        )
    unknown = [name for name in adapter_names or () if name not in known]
    if unknown:
        raise AdapterNameError(f"There are no adapters {unknown}; the model has {known}.")
    return unload(root, merge=True, safe_merge=safe_merge, adapter_names=adapter_names)


def unload(root: nn.Module, *, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """Takes every adapter out of a stock model in which they are injected, merged or not; all of it or nothing."""
    if merge:
        active: dict[str, None] = {}
        for _, layer in tuned_layers(root):
            layer.check_merge(safe_merge, adapter_names)
            active |= dict.fromkeys(layer.active_adapters)
        names = list(adapter_names or active)
        token_rows = [module for module in root.modules() if isinstance(module, TokenRows)]
        for rows in token_rows:
            rows.check_merge(safe_merge, names)
        prepare_merge(root, names)
        if any(rows.serves(names) for rows in token_rows):
            keep_rows(root)
    for name, module in reversed(list(root.named_modules())):
        if isinstance(module, (BitFitLayer, BitFitHead)):
            with onload_layer(module):
                take_out(root, name, module, merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)
    restore_rows(root)
    vars(root).pop("peft_config", None)
    forget_configs(root)
    return root


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
