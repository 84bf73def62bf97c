"""Adapters (Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bitfit_hf.terms import find_biases, head_modules
from bitfit_hf.terms.structure import LINEAR, NORM, kind_of, walk

from .base import StoredWhole, train_head_only


class Bottleneck(nn.Module):
    """
    `h + U gelu(D h + c) + b` with D of `m` rows and U of `m` columns: `2 m d + d + m` parameters.

    It starts close to the identity: weights from a normal distribution of standard deviation 1e-3 that is cut off at
    two of them, biases at zero, as in the authors' code.

    Args:
        size (`int`): d, the features of what it stands behind.
        bottleneck (`int`): m.
    """

    def __init__(self, size: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, bottleneck)
        self.up = nn.Linear(bottleneck, size)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=1e-3, a=-2e-3, b=2e-3)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = hidden.to(self.down.weight.dtype)
        return hidden + self.up(nn.functional.gelu(self.down(inner))).to(hidden.dtype)


class Adapter(StoredWhole):
    """
    Puts two bottlenecks into each layer and trains them, the norms and the task head.

    A bottleneck stands right behind the projection that ends a block, that of the attention (b_m1) and that of the MLP
    (b_m3), so before the residual and the LayerNorm. (The authors apply the dropout that follows the projection before
    the bottleneck, here it comes after it.) In a layer of BERT this trains `2 (2 m d + d + m)` parameters of the
    bottlenecks and `2 · 2 d` of the LayerNorms; LayerNorms outside the layers are trained too. The grid of rates and
    the sizes {8, 64, 256} are the paper's.

    Args:
        bottleneck (`int`, *optional*, defaults to 64): m, the features of the bottlenecks.
        seed (`int`, *optional*, defaults to 0): For their weights.
    """

    name = "adapter"
    learning_rates = (3e-5, 3e-4, 3e-3)

    _FILE = "adapter.safetensors"

    def __init__(self, bottleneck: int = 64, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if bottleneck < 1:
            raise ValueError(f"bottleneck={bottleneck} is no number of features: pass 1 or more; the paper has 64.")
        self.bottleneck = bottleneck

    def _prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        train_head_only(model)
        for norm in norms(model):
            norm.requires_grad_(True)
        for path, size in ends_of_blocks(model).items():
            module = model.get_submodule(path)
            module.bottleneck = Bottleneck(size, self.bottleneck).to(next(module.parameters()).device)
            module.register_forward_hook(_through_bottleneck)
        return model


# A function of the module rather than a closure over its bottleneck: copies of the model run through their own.
def _through_bottleneck(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return module.bottleneck(output)


def ends_of_blocks(model: PreTrainedModel) -> dict[str, int]:
    """The projections that end an attention or MLP block, as path -> output features; one shared by layers once.

    Raises:
        `ValueError`: There is none, or one that is not called as a module.
    """
    ends: dict[str, int] = {}
    seen: set[int] = set()
    for bias in find_biases(model, add_missing_biases=True):
        module = model.get_submodule(bias.module)
        if bias.term in ("attention_output", "output") and kind_of(module) == LINEAR and id(module) not in seen:
            seen.add(id(module))
            ends[bias.module] = bias.shape[0]
    fused = [path for path in ends if isinstance(_parent(model, path), nn.MultiheadAttention)]
    if fused or not ends:
        problem = f"{fused[0]} is read by torch's MultiheadAttention, not called" if fused else "none was found"
        raise ValueError(
            f"Adapters stand behind the linear projections that end the blocks of {type(model).__name__}: {problem}. "
            "Use another method for this architecture."
        )
    return ends


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def norms(model: nn.Module) -> list[nn.Module]:
    """The norms outside the task head."""
    head = tuple(f"{path}." for path in head_modules(model))
    return [module for path, module in walk(model) if kind_of(module) == NORM and not f"{path}.".startswith(head)]
