"""How modules of the base take part in a mixed batch: their forward is taken over, in one way for all.

[`intercept`] is that way. The layers that add each example's own delta ([`bitfit_hf.bank.layers`]) and the leaves of a
head ([`bitfit_hf.bank.heads`]) use it too. Here are the two that need not know what the module computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import TaskBankError
from ..tuner.nested import SHARED, Path, rebuild, same, take, tensors
from .batch import Batch, BatchTask, current
from .sites import Site


def intercept(module: nn.Module, run: Callable[..., Any]) -> None:
    """Lets `run(batch, forward, *args, **kwargs)` answer for a module while a batch of the bank runs.

    Args:
        module (`nn.Module`): Of the bank's own copy of the base. Outside a batch it computes as it always did.
        run (`Callable`): Gets the batch, the forward that it replaces, and the arguments of the call.
    """
    replaced = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        batch = current()
        return replaced(*args, **kwargs) if batch is None else run(batch, replaced, *args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


def run_once(module: nn.Module) -> None:
    """Has a module that stands in several task models run once for a batch.

    The task models of a batch are run one after the other, each on the whole batch. The first to call the module runs
    it; the others, whose arguments are the same, get what it returned. So the backbone runs once whatever the mix.
    Classes that call it with other arguments (Longformer's global attention differs between tasks) get a run of their
    own.
    """
    signature = inspect.signature(type(module).forward)

    def run(batch: Batch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if batch.shared is None:
            return forward(*args, **kwargs)
        named = named_arguments(signature, args, kwargs)
        known = batch.shared.setdefault(module, [])
        for arguments, result in known:
            if same(arguments, named):
                return result
        result = forward(*args, **kwargs)
        known.append((named, result))
        return result

    intercept(module, run)


def named_arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without those that are what they are by default.

    Args:
        signature (`inspect.Signature`): Of the class's forward, `self` included.
        args (`Sequence`), kwargs (`Mapping`): As they were passed.
    """
    named = dict(signature.bind(None, *args, **kwargs).arguments)
    named |= named.pop("kwargs", {})
    return {name: value for name, value in named.items() if not _is_default(name, value)}


def _is_default(name: str, value: Any) -> bool:
    # Some classes spell out what is the default in the bank's copies: named outputs, and nothing cached.
    return value is None or (value is True if name == "return_dict" else value is False)


def run_task_by_task(
    path: str, module: nn.Module, sites: Iterable[Site], inputs: Mapping[Path, int], outputs: Mapping[Path, int]
) -> None:
    """Has a module run once for each task of a batch, on the rows of that task.

    Some biases are not added to a layer's output: DeBERTa and XLNet keep free vectors that their attention adds to
    something inside, `nn.MultiheadAttention` has its projections' biases in one vector, and DeBERTa's relative
    positions go through layers whose output all examples share. There, the smallest enclosing module that takes and
    returns examples is split. Every example is still computed once, so this costs efficiency (smaller products), not
    arithmetic; the rest of the base still sees the whole batch.

    Args:
        path (`str`): The module's path in the base.
        module (`nn.Module`): The module, of the bank's own copy of the base.
        sites (`Iterable[Site]`): The biases that make it necessary; a batch without deltas there is not split.
        inputs (`Mapping`): Batch dimension of each tensor among the arguments, by its path in `(args, kwargs)`.
        outputs (`Mapping`): The same of each tensor of the output.
    """
    numbers = [site.number for site in sites]

    def run(batch: Batch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mixed = batch.only_task is None and batch.read_outside is None
        if not mixed or not any(batch.tuned[number] for number in numbers):
            return forward(*args, **kwargs)
        results = []
        for task in batch.tasks:
            part_args, part_kwargs = rebuild((args, kwargs), partial(part, batch, task))
            results.append(batch.run_only(task, forward, *part_args, **part_kwargs))
        parts = [tensors(result) for result in results]
        order = torch.argsort(torch.tensor([example for task in batch.tasks for example in task.examples]))

        def whole(at: Path, tensor: torch.Tensor) -> torch.Tensor:
            axis = outputs.get(at, 0)
            joined = torch.cat([found[at] for found in parts], dim=axis)
            return take(joined, axis, order.to(joined.device), batch.size)

        return rebuild(results[0], whole)

    def part(batch: Batch, task: BatchTask, at: Path, tensor: torch.Tensor) -> torch.Tensor:
        axis = inputs.get(at)
        if axis is None:  # an optional argument that the trial run did not use
            axis = SHARED if tensor.dim() == 0 or tensor.shape[0] == 1 else 0
            if axis == 0 and tensor.shape[0] != batch.size:
                raise TaskBankError(
                    f"{path} gets an argument {at} of shape {list(tensor.shape)} that the bank's trial run did not "
                    "use, so it is not known which of its rows belong to which example. Make the bank with "
                    "`example_inputs=` like those of this call."
                )
        return tensor if axis == SHARED else take(tensor, axis, task.index(tensor.device), batch.size)

    intercept(module, run)
