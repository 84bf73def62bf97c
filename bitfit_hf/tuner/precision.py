"""Containers whose tensors stay float32 when the model around them is cast.

bfloat16 loses the small steps of bias tuning: 1.0 ignores an update of 1e-3. So deltas and heads stay float32 through
`model.to(dtype)`, `model.half()` and the Trainer's `bf16_full_eval`, which all come down to `nn.Module._apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _without_cast(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return apply


class Float32ParameterDict(nn.ParameterDict):
    """Parameters by adapter name; moved between devices, never cast."""

    def __getitem__(self, key: str) -> Any:
        found = self._parameters.get(key)  # the long way is for what takes its place, such as a view under FSDP1
        return super().__getitem__(key) if found is None else found

    def share(self, name: str, parameter: nn.Parameter) -> None:
        """Takes in a parameter of another place, the very object: under `low_cpu_mem_usage` PEFT patches registration
        to make an empty copy of each."""
        self[name] = parameter
        self._parameters[name] = parameter

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Float32ParameterDict:
        return super()._apply(_without_cast(fn), recurse)


class Float32ModuleDict(nn.ModuleDict):
    """Modules by adapter name; moved between devices, never cast."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Float32ModuleDict:
        return super()._apply(_without_cast(fn), recurse)
