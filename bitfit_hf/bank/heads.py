"""The parts of a task model's head: each task's own leaves, on the rows of its examples, and its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..tuner.nested import rebuild, rows_of, tensors
from ..tuner.reading import install
from .batch import Batch, current
from .intercept import intercept

_SMALL_WEIGHT = 1 << 16  # values; copying that much for each example costs less than a product of its own


def run_head_of_each_task(path: str, leaf: nn.Module) -> None:
    """Has each task's own leaf run in place of `leaf`, in float32, on the rows of the task's examples.

    Where it is a small Linear, as most heads end in, all tasks' are run in one batched product.

    Args:
        path (`str`): The leaf's path in the task's class.
        leaf (`nn.Module`): The leaf of the task model. Its own tensors are never computed with.
    """
    small = type(leaf) is nn.Linear and leaf.weight.numel() <= _SMALL_WEIGHT

    def run(batch: Batch, _: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = rebuild((args, kwargs), _float32)
        own = [(task, task.head[path]) for task in batch.answering]
        if len(batch.tasks) == 1:
            return own[0][1](*args, **kwargs)
        first = next(iter(tensors((args, kwargs)).values()))
        rows = first.shape[0]
        each = batch.rows_each(rows, f"The head's {path}")
        if small and each == 1 and len(args) == 1 and not kwargs and first.dim() in (2, 3):
            return _product_per_example([own[place][1] for place in batch.owners(batch.answering)], first)
        result = None
        for task, module in own:
            where = rows_of(task.index(first.device), each)
            own_args, own_kwargs = rebuild((args, kwargs), partial(_pick, where, rows))
            answer = module(*own_args, **own_kwargs)
            if result is None:
                result = answer.new_zeros((rows, *answer.shape[1:]))
            result.index_copy_(0, where, answer)
        return result

    intercept(leaf, run)


class HeadParameter(nn.Module):
    """A parameter of a task's head that lies in no module.

    Args:
        value (`torch.Tensor`): Its value.
    """

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)


def read_parameter_of_the_task(path: str, owner: nn.Module) -> None:
    """Lets a task model read, in the place of a parameter that it holds itself, that of the one task being run.

    It reads the parameter as a whole, so it cannot be another one for each example of a batch: such a task model is
    run for one task at a time.

    Args:
        path (`str`): The parameter's name in the task's class.
        owner (`nn.Module`): Holds the task model's own, whose values are never computed with.
    """
    install(owner, (path.rpartition(".")[2],), owner=_TaskParameter(path))


class _TaskParameter:
    def __init__(self, path: str) -> None:
        self._path = path

    def effective_bias(self, parameter: str, base: torch.Tensor | None) -> torch.Tensor | None:
        batch = current()
        if batch is None or base is None:
            return base
        (task,) = batch.answering
        part = task.head[self._path]
        assert isinstance(part, HeadParameter)
        return part.value.to(base.dtype)


def _product_per_example(leaves: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Each example's rows of `x`, `(examples, ..., in)`, through its own Linear."""
    weights, biases = ([leaf._parameters[name] for leaf in leaves] for name in ("weight", "bias"))
    weight = torch.stack(weights).transpose(1, 2)  # type: ignore[arg-type]
    rows = x if x.dim() == 3 else x.unsqueeze(1)
    if biases[0] is None:
        result = torch.bmm(rows, weight)
    else:
        result = torch.baddbmm(torch.stack(biases).unsqueeze(1), rows, weight)  # type: ignore[arg-type]
    return result if x.dim() == 3 else result.squeeze(1)


def _float32(_: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _pick(where: torch.Tensor, rows: int, _: Any, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_select(0, where) if tensor.dim() and tensor.shape[0] == rows else tensor
