"""Wrapping the parts of a model as a [`Plan`] says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..terms.structure import HOLDER, stock_module
from .added_tokens import AddedTokens
from .head import BitFitHead
from .head_parameter import HeadParameter
from .layer import BitFitLayer
from .plan import Plan
from .quantized_layer import BitsAndBytesLayer, is_bitsandbytes
from .state import head_leaves, tuned_layers
from .token_rows import TokenRows, token_layers


def wrap_layers(
    model: nn.Module,
    adapter_name: str,
    plan: Plan,
    *,
    active: list[str],
    inference_mode: bool,
    device: torch.device | None,
) -> None:
    """Wraps the layers that are tuned, those whose biases are tied to theirs too, and gives them their deltas.

    Args:
        model (`nn.Module`): The base model.
        adapter_name (`str`): Name of the new adapter.
        plan ([`Plan`]): What is tuned.
        active (`list[str]`): The active adapters.
        inference_mode (`bool`): Leaves the deltas frozen.
        device (`torch.device`, *optional*): Where the deltas are made; by default, where each layer is.
    """
    for path, biases in plan.by_module().items():
        layer = _wrapped(model, path, plan.parameters[path], active)
        layer.update_layer(adapter_name, biases, inference_mode=inference_mode, device=device)
    for bias in plan.biases:
        for alias in bias.aliases:
            path, _, parameter = alias.rpartition(".")
            other = _wrapped(model, path, (parameter,), active)
            other.share_delta(adapter_name, parameter, _layer_at(model, bias.module), bias.parameter)


def _wrapped(model: nn.Module, path: str, parameters: Sequence[str], active: list[str]) -> BitFitLayer:
    parent, name = _place(model, path)
    child = parent._modules[name]
    assert child is not None
    if isinstance(child, BitFitLayer):
        return child
    layer = (BitsAndBytesLayer if is_bitsandbytes(child) else BitFitLayer)(child, parameters)
    layer.train(child.training)
    layer._active_adapter = active
    setattr(parent, name, layer)
    return layer


def wrap_tokens(
    model: nn.Module, adapter_name: str, tokens: AddedTokens, *, active: list[str], inference_mode: bool
) -> None:
    """Wraps the layers with a row per token, so that the rows of added tokens are the adapter's own."""
    wrapped: dict[str | None, TokenRows] = {}
    for path, leader in token_layers(tokens):
        parent_path, _, name = path.rpartition(".")
        parent = _stock_at(model, parent_path)
        layer = parent._modules[name]
        assert layer is not None
        new = not isinstance(layer, TokenRows)
        if isinstance(layer, TokenRows):
            layer.update(adapter_name, start=tokens.start, count=tokens.count)
        else:
            layer = TokenRows(layer, adapter_name, start=tokens.start, count=tokens.count, leader=wrapped.get(leader))
            setattr(parent, name, layer)
        if new or adapter_name in active:
            layer.set_adapter(active, inference_mode=inference_mode)
        wrapped[path] = layer


def wrap_head(model: nn.Module, adapter_name: str, plan: Plan, *, active: list[str], inference_mode: bool) -> None:
    """Gives the adapter a head of its own, with its labels, switched together with the first tuned layer."""
    is_active = adapter_name in active
    for path in plan.head:
        parent_path, _, name = path.rpartition(".")
        parent = _stock_at(model, parent_path)
        module = parent._modules.get(name)
        if module is None:  # a parameter
            name = HOLDER + name
            module = parent._modules.get(name)
        size = plan.labels.num_labels if plan.labels is not None and path == plan.logits else None
        if isinstance(module, BitFitHead):
            leaf = module
            leaf.update(adapter_name, num_labels=size)
        else:
            if module is None:
                leaf = HeadParameter(parent, name.removeprefix(HOLDER), adapter_name)
            else:
                leaf = BitFitHead(module, adapter_name, num_labels=size, in_the_middle=path in plan.middle)
            setattr(parent, name, leaf)
            leaf.set_adapter(adapter_name if is_active else [], inference_mode=inference_mode)
        if is_active:
            leaf.set_adapter(adapter_name, inference_mode=inference_mode)
        if path == plan.labels_at:
            assert isinstance(model, PreTrainedModel)
            assert plan.labels is not None
            leaf.carry_labels(model, adapter_name, plan.labels)
    leaves = [leaf for _, leaf in head_leaves(model)]
    for _, layer in tuned_layers(model):
        layer.switch_head_along(leaves)
        break


def _stock_at(model: nn.Module, path: str) -> nn.Module:
    """The stock module at a stock path of a model in which wrappers may have been injected."""
    module = stock_module(model)
    for name in path.split(".") if path else ():
        module = stock_module(module._modules[name])  # type: ignore[arg-type]
    return module


def _layer_at(model: nn.Module, path: str) -> BitFitLayer:
    """The BitFit layer around the module at a stock path."""
    parent, name = _place(model, path)
    layer = parent._modules[name]
    assert isinstance(layer, BitFitLayer)
    return layer


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Where the module at a stock path, or its BitFit layer, hangs: the live parent and the name there."""
    parent_path, _, name = path.rpartition(".")
    parent = _stock_at(model, parent_path)
    child = parent._modules[name]
    return (child, "original_module") if isinstance(child, TokenRows) else (parent, name)
