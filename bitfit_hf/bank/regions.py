"""[`Region`]: a part of the base that is run for one task at a time.

Some biases are not added to a layer's output: DeBERTa and XLNet keep free vectors that their attention adds to
something inside, `nn.MultiheadAttention` has its projections' biases in one vector, and DeBERTa's relative positions
go through layers whose output all examples share. There, the smallest enclosing module that takes and returns examples
is run once for each task of the batch, on the rows of that task. Every example is still computed once, so this costs
efficiency (smaller products), not arithmetic; the rest of the base still sees the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import TaskBankError
from ..tuner.nested import SHARED, Path, leaves, rebuild, take
from .batch import Batch, Member, current
from .sites import Site

Axes = Mapping[Path, int]


class Region:
    """Takes over the forward of a module.

    Args:
        path (`str`): The module's path in the base.
        module (`nn.Module`): The module, of the bank's own copy of the base.
        sites (`Iterable[Site]`): The biases that make it necessary; a batch without deltas there is not split.
        inputs (`Mapping`): Batch dimension of each tensor among the arguments, by its path in `(args, kwargs)`.
        outputs (`Mapping`): The same of each tensor of the output.
    """

    def __init__(self, path: str, module: nn.Module, sites: Iterable[Site], inputs: Axes, outputs: Axes) -> None:
        self.path = path
        self.numbers = [site.number for site in sites]
        self._inputs = dict(inputs)
        self._outputs = dict(outputs)
        self._own_forward = module.forward
        module.forward = self.forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        batch = current()
        if batch is None or batch.alone is not None or batch.strangers is not None:
            return self._own_forward(*args, **kwargs)
        if not any(batch.active[number] for number in self.numbers):
            return self._own_forward(*args, **kwargs)
        results = []
        for member in batch.members:
            part_args, part_kwargs = rebuild((args, kwargs), partial(self._part, batch, member))
            with batch.only(member):
                results.append(self._own_forward(*part_args, **part_kwargs))
        order = torch.tensor([example for member in batch.members for example in member.examples])
        return self._join(results, torch.argsort(order), batch.size)

    def _part(self, batch: Batch, member: Member, path: Path, tensor: torch.Tensor) -> torch.Tensor:
        axis = self._inputs.get(path)
        if axis is None:
            # An optional argument that the trial run did not use.
            if tensor.dim() == 0 or tensor.shape[0] == 1:
                axis = SHARED
            elif tensor.shape[0] == batch.size:
                axis = 0
            else:
                raise TaskBankError(
                    f"{self.path} gets an argument {path} of shape {list(tensor.shape)} that the bank's trial run did "
                    "not use, so it is not known which of its rows belong to which example. Make the bank with "
                    "`example_inputs=` like those of this call."
                )
        return tensor if axis == SHARED else take(tensor, axis, member.index(tensor.device), batch.size)

    def _join(self, results: list[Any], order: torch.Tensor, size: int) -> Any:
        columns: dict[Path, list[torch.Tensor]] = {}
        for result in results:
            for path, value in leaves(result):
                columns.setdefault(path, []).append(value)

        def joined(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            axis = self._outputs.get(path, 0)
            whole = torch.cat(columns[path], dim=axis)
            return take(whole, axis, order.to(whole.device), size)

        return rebuild(results[0], joined)
