"""Nested arguments and outputs of modules: walking through them, and which of their rows belong to which example.

That the first dimension of a tensor is the batch holds for most layers of most models, not for all. So who mixes tasks
or adapters in a batch runs the model on two sizes of it, and holds the shapes against each other, see [`batch_axis`].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Path = tuple[str | int, ...]

SHARED = -1  # in place of a batch dimension: the tensor is the same for all examples


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields what lies in nested tuples, lists and mappings, with its path; `None` is left out."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for number, value in enumerate(tree):
            yield from leaves(value, (*path, number))
    elif tree is not None:
        yield path, tree


def tensors(tree: Any) -> dict[Path, torch.Tensor]:
    """The tensors in nested tuples, lists and mappings, by their path."""
    return {path: value for path, value in leaves(tree) if isinstance(value, torch.Tensor)}


def rebuild(tree: Any, change: Callable[[Path, torch.Tensor], torch.Tensor], path: Path = ()) -> Any:
    """A copy of `tree` with every tensor replaced by `change(path, tensor)`."""
    if isinstance(tree, torch.Tensor):
        return change(path, tree)
    if isinstance(tree, Mapping):
        values = {key: rebuild(value, change, (*path, key)) for key, value in tree.items()}
        return values if type(tree) is dict else type(tree)(**values)
    if isinstance(tree, (tuple, list)):
        items = [rebuild(value, change, (*path, number)) for number, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def same(first: Any, second: Any) -> bool:
    """Whether two nested arguments are equal; a `None` is like no argument."""
    one, two = dict(leaves(first)), dict(leaves(second))
    return one.keys() == two.keys() and all(_equal(value, two[path]) for path, value in one.items())


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one is two or (one.dtype == two.dtype and one.device == two.device and torch.equal(one, two))
    return type(one) is type(two) and bool(one == two)


def batch_axis(first: tuple[int, ...], second: tuple[int, ...], sizes: tuple[int, int]) -> int | None:
    """Which dimension of a tensor is the batch, told from its shapes for batches of two `sizes`.

    Returns:
        `int` or `None`: The dimension that grows with the batch, [`SHARED`] where none does, `None` where several do
        or one grows in another way.
    """
    if len(first) != len(second):
        return None
    grown = [axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if not grown:
        return SHARED
    (axis, *more) = grown
    return axis if not more and first[axis] * sizes[1] == second[axis] * sizes[0] else None


def rows_per_example(rows: int, examples: int) -> int | None:
    """How many consecutive rows of the batch dimension are one example's.

    Some models fold windows, patches or choices into the batch, the example outermost.

    Returns:
        `int`, or `None` where the rows cannot be shared out evenly.
    """
    each, rest = divmod(rows, examples)
    return each if each and not rest else None


def take(tensor: torch.Tensor, axis: int, examples: torch.Tensor, size: int) -> torch.Tensor:
    """The part of `tensor` that belongs to some examples of a batch of `size`, `axis` being the batch."""
    each = rows_per_example(tensor.shape[axis], size) or 1
    return tensor.index_select(axis, rows_of(examples, each))


def rows_of(examples: torch.Tensor, each: int) -> torch.Tensor:
    """The rows of some examples that have `each` rows."""
    if each == 1:
        return examples
    return (examples[:, None] * each + torch.arange(each, device=examples.device)).flatten()
