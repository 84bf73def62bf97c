"""Mixed batches: which rows of a layer's output belong to which example of the batch.

PEFT's `model(..., adapter_names=[...])` names one adapter per example. A layer sees only a tensor; that its first
dimension is the batch is an assumption. It holds for most layers of most models. Some fold windows, patches or choices
into the batch, and some compute a table that all examples share (DeBERTa's relative positions), whose length may even
equal the batch's. So one example is run alone first, and what a layer makes of it is held against what it makes of the
batch: only where that grows with the batch do rows belong to examples.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import AdapterNameError, UnsupportedLayerError
from ..terms.structure import stock_module
from .reading import stock_class

BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch

# What a forward's batch is read off, in this order.
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


class RowCheck:
    """What is known about the rows of the layers of a model while one mixed batch runs.

    Args:
        rows_alone (`Mapping[nn.Module, Sequence[int]]`, *optional*):
            How many rows each layer made of one example, call by call. Without it, that the first dimension of every
            layer's output is the batch, or a multiple of it, is taken for granted.
    """

    def __init__(self, rows_alone: Mapping[nn.Module, Sequence[int]] | None = None) -> None:
        self._alone = None if rows_alone is None else {layer: iter(rows) for layer, rows in rows_alone.items()}

    def rows_per_example(self, layer: nn.Module, rows: int, batch: int) -> int:
        """How many consecutive rows of a layer's output are one example's.

        Raises:
            [`UnsupportedLayerError`]: The rows do not belong to examples.
        """
        if self._alone is None:
            alone, rest = divmod(rows, batch)
            fits = alone > 0 and not rest
        else:
            alone = next(self._alone.get(layer, iter(())), 0)
            fits = rows == alone * batch
        if not fits:
            kind = stock_class(stock_module(layer)).__name__
            raise UnsupportedLayerError(
                f"A {kind} layer computes {rows} rows for a batch of {batch} examples and {alone or 'other'} for one "
                "alone: they do not belong to single examples (a table that all share, or a batch that is not the "
                "first dimension), so `adapter_names` cannot be applied per example. Run one batch per adapter, or "
                "use `bitfit_hf.TaskBank`."
            )
        return alone


def check_adapter_names(adapter_names: Sequence[str], known: Sequence[str], batch: int | None) -> None:
    """Raises [`AdapterNameError`] for names of a mixed batch that are no adapters, or are not one per example."""
    if isinstance(adapter_names, str):
        raise AdapterNameError(f"`adapter_names` takes a list with one name per example, got {adapter_names!r}.")
    unknown = sorted({str(name) for name in adapter_names} - {*known, BASE})
    if unknown:
        raise AdapterNameError(
            f"`adapter_names` asks for {unknown}, but the model has the adapters {sorted(known)}. "
            f'Load them first (`model.load_adapter(…, adapter_name="{unknown[0]}")`), or use "{BASE}" for the base.'
        )
    if batch is not None and len(adapter_names) != batch:
        raise AdapterNameError(
            f"`adapter_names` has {len(adapter_names)} names for a batch of {batch} examples; give one for each."
        )


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many examples a call of a model's forward is about; `None` where it gets no tensor."""
    named = [kwargs[name] for name in _MAIN_INPUTS if name in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


@torch.no_grad()
def rows_of_one_example(
    model: nn.Module, layers: Iterable[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
) -> dict[nn.Module, list[int]] | None:
    """Runs the first example of a batch alone, and counts the rows that each layer computes for it.

    Args:
        model (`nn.Module`): The model whose forward is about to get `args` and `kwargs`.
        layers (`Iterable[nn.Module]`): Layers inside it.
        batch (`int`): Number of examples.

    Returns:
        `dict[nn.Module, list[int]]`, call by call, or `None` where the arguments are not those of the forward.
    """
    alone = {name: _first(value, batch) for name, value in kwargs.items()}
    if alone.pop("past_key_values", None) is not None:  # it would be written to
        alone["use_cache"] = False
    first = [_first(value, batch) for value in args]
    try:
        inspect.signature(model.forward).bind(*first, **alone)
    except TypeError:
        return None
    rows: dict[nn.Module, list[int]] = defaultdict(list)

    def count(layer: nn.Module, inputs: Any, output: Any) -> None:
        while not isinstance(output, torch.Tensor):
            output = output[0]
        rows[layer].append(output.shape[0])

    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        model(*first, **alone)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _first(value: Any, batch: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:1] if value.dim() > 0 and value.shape[0] == batch else value
    if isinstance(value, (tuple, list)) and any(isinstance(item, torch.Tensor) for item in value):
        return type(value)(_first(item, batch) for item in value)
    return value


def pick_rows(
    results: Mapping[str, Any], adapter_names: Sequence[str], rows_per_example: Callable[[int, int], int]
) -> Any:
    """Takes each example's rows from the result of its own adapter.

    Args:
        results (`Mapping[str, Any]`): What a layer computed for the whole batch, by adapter.
        adapter_names (`Sequence[str]`): One per example.
        rows_per_example (`Callable`): From the number of rows and of examples to that of one example's rows.

    Returns:
        What the layer returns: a tensor, or a tuple or list with tensors.
    """
    first = next(iter(results.values()))
    size = _num_rows(first)
    return first if size is None else _pick(results, adapter_names, rows_per_example(size, len(adapter_names)))


def _num_rows(output: Any) -> int | None:
    if isinstance(output, torch.Tensor):
        return output.shape[0]
    if isinstance(output, (tuple, list)):
        return next((rows for rows in map(_num_rows, output) if rows is not None), None)
    return None


def _pick(results: Mapping[str, Any], adapter_names: Sequence[str], factor: int) -> Any:
    first = next(iter(results.values()))
    if isinstance(first, torch.Tensor):
        return torch.cat([results[name][i * factor : (i + 1) * factor] for i, name in enumerate(adapter_names)])
    if isinstance(first, (tuple, list)):
        columns = zip(*results.values(), strict=True)
        return type(first)(
            [_pick(dict(zip(results, column, strict=True)), adapter_names, factor) for column in columns]
        )
    return first
