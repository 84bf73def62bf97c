"""Gradient checkpointing of models whose first layers are frozen.

The reentrant kind of checkpointing passes gradients on only where its input requires them, and the embeddings of a
tuned model may be frozen altogether. transformers makes their output require gradients for text models and for
adapters in place, by a hook that fails where an embedding returns a tuple (Swin), and not for wrapped vision or speech
models. This does it for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..terms.structure import stock_root


def let_gradients_through(model: nn.Module) -> list[RemovableHandle]:
    """Makes what the input embeddings return require gradients where gradient checkpointing is on.

    Args:
        model (`nn.Module`): With deltas injected, in place or wrapped.

    Returns:
        `list[RemovableHandle]`: The hooks, to be removed after training.
    """
    root = stock_root(model)
    if not any(getattr(module, "gradient_checkpointing", False) for module in root.modules()):
        return []
    if isinstance(root, PreTrainedModel):
        root.disable_input_require_grads()
    embeddings = {id(module): module for module in _input_embeddings(root)}
    return [module.register_forward_hook(_require_gradients) for module in embeddings.values()]


def _input_embeddings(root: nn.Module) -> Iterator[nn.Module]:
    for module in root.modules():
        if isinstance(module, PreTrainedModel):
            try:
                embeddings = module.get_input_embeddings()
            except NotImplementedError:
                continue
            if isinstance(embeddings, nn.Module):
                yield embeddings


def _require_gradients(module: nn.Module, inputs: Any, output: Any) -> None:
    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_(True)
