"""What a forward pass leaves in memory for the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Made(TorchDispatchMode):
    """Notes every storage that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> dict[int, int]:
        """Size of each storage that is still in use, by its address."""
        return {key: size for key, (reference, size) in self.storages.items() if not reference.expired()}


def kept_bytes(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """Bytes that a forward pass allocates and that are still in use when only its loss is held.

    What is in use is counted, rather than what autograd is seen to save: that also finds what something else keeps.

    Args:
        model (`torch.nn.Module`): Its parameters and buffers, and the batch, do not count.
        batch (`Mapping[str, torch.Tensor]`): With labels.

    Returns:
        `int`: Each storage once.
    """
    others = [*model.parameters(), *model.buffers(), *batch.values()]
    there = {tensor.untyped_storage()._cdata for tensor in others}
    with _Made() as made:
        loss = model(**batch).loss
    kept = sum(size for key, size in made.alive().items() if key not in there)
    del loss
    return kept
