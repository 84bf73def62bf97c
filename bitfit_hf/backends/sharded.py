"""Tensors that several processes hold in slices (FSDP2, DeepSpeed ZeRO-3): gathering them, and writing into them.

Both are collective: every process has to take part, also those that have no use for the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def put_back(model: nn.Module) -> None:
    """Has FSDP2 take back the whole parameters that it still lends to a model, as its root does after an evaluation.

    They are copies, in a lower precision where FSDP's mixed precision is on; what is written into them is lost.

    Args:
        model (`nn.Module`): Sharded or not.
    """
    sharded: Any
    for sharded in model.modules():
        if type(sharded).__name__.startswith("FSDP") and hasattr(sharded, "reshard"):
            sharded.reshard()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a single process would hold it: gathered where it is sharded, itself where it is not.

    Args:
        tensor (`torch.Tensor`): A `DTensor`, a parameter that ZeRO-3 has partitioned, or any other.
    """
    sharded: Any = tensor
    if hasattr(sharded, "full_tensor"):  # a DTensor, or a parameter made of one
        return sharded.detach().full_tensor()
    if is_partitioned(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([sharded]):
            return tensor.detach().clone()
    return tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a parameter is in slices just now. While its layer computes, FSDP2 and ZeRO-3 lend it the whole one."""
    return hasattr(tensor, "full_tensor") or is_partitioned(tensor)


def is_flattened(parameter: torch.Tensor) -> bool:
    """Whether FSDP1 keeps the values of this parameter in its flat buffer, so that its module cannot compute now.

    While the module computes, a view of the whole buffer is in the parameter's place. FSDP2, which leaves the same
    marks on its modules, has a whole parameter there.
    """
    if isinstance(parameter, nn.Parameter):
        return getattr(parameter, "_fsdp_flattened", False)
    return parameter.untyped_storage().nbytes() == 0  # a view that is left when the buffer has been given back


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 has left an empty parameter behind, whose values are in slices elsewhere."""
    return tensor.numel() == 0 and getattr(tensor, "ds_numel", 0) > 0


def lent(parameter: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A parameter that `layer` computes with, though it belongs to another module.

    ZeRO-3 fetches what a module owns when the module runs. It has to be told of anything else: then it fetches that
    too from now on, in backward as well, and leaves it in slices again afterwards.

    Args:
        parameter (`torch.Tensor`): Perhaps partitioned.
        layer (`nn.Module`): Is running just now.
    """
    if is_partitioned(parameter):
        from deepspeed.runtime.zero import register_external_parameter

        register_external_parameter(layer, parameter)
        parameter.all_gather()  # type: ignore[attr-defined]
    return parameter


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
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([sharded], modifier_rank=0):
            target.copy_(value)
    else:
        target.copy_(value)
