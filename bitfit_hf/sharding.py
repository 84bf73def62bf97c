"""Tensors that several processes hold in slices (FSDP2, DeepSpeed ZeRO-3): gathering them, and writing into them.

Both are collective: every process has to take part, also those that have no use for the result.
"""

from __future__ import annotations

from typing import Any

import torch


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a single process would hold it: gathered where it is sharded, itself where it is not.

    Args:
        tensor (`torch.Tensor`): A `DTensor`, a parameter that ZeRO-3 has partitioned, or any other.
    """
    sharded: Any = tensor
    if hasattr(sharded, "full_tensor"):  # a DTensor, or a parameter made of one
        return sharded.detach().full_tensor()
    if is_partitioned(tensor):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([sharded]):
            return tensor.detach().clone()
    return tensor


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 has left an empty parameter behind, whose values are in slices elsewhere."""
    return tensor.numel() == 0 and getattr(tensor, "ds_numel", 0) > 0


@torch.no_grad()
def write_whole(target: torch.Tensor, value: torch.Tensor) -> None:
    """Writes a whole tensor into one that may be sharded.

    Args:
        target (`torch.Tensor`): See [`gathered`].
        value (`torch.Tensor`): The same on every process.
    """
    sharded: Any = target
    if hasattr(sharded, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=sharded.device, dtype=sharded.dtype)
        target.copy_(distribute_tensor(value, sharded.device_mesh, sharded.placements))
    elif is_partitioned(target):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([sharded], modifier_rank=0):
            target.copy_(value)
    else:
        target.copy_(value)
