"""Mixed batches: one adapter per example, and which rows of a layer's output belong to which example.

PEFT's `model(..., adapter_names=[...])` names one adapter per example. A layer sees only a tensor; that its first
dimension is the batch is an assumption. It holds for most layers of most models. Some fold windows, patches or choices
into the batch, and some compute a table that all examples share (DeBERTa's relative positions), whose length may even
equal the batch's. So one example is run alone first, and what a layer makes of it is held against what it makes of the
batch: only where that grows with the batch do rows belong to examples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import AdapterNameError, UnsupportedLayerError
from ..terms.structure import stock_module
from .nested import rebuild, rows_per_example, tensors
from .reading import stock_class

BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch

# What a forward's batch is read off, in this order.
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


class MixedBatch:
    """While it is open, every forward of the model computes example `i` with adapter `adapter_names[i]`.

    Args:
        model (`nn.Module`): The stock model, with adapters injected.
        parts (`Sequence[BitFitLayer | BitFitHead]`): What in it has adapters.
        adapter_names (`Sequence[str]`): One per example: names that the model has, or `BASE`.
        sequences (`int`, *optional*, defaults to 1): How many sequences `generate` keeps for each example, see
            [`sequences_per_example`]. The encoder of an encoder-decoder model still sees each example once.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[Any], adapter_names: Sequence[str], sequences: int = 1
    ) -> None:
        self.adapter_names = list(adapter_names)
        self._repeated = [name for name in adapter_names for _ in range(sequences)]
        self._model = model
        self._parts = parts
        self._handles: list[Any] = []
        self._checked = False
        self._rows_alone: dict[nn.Module, Iterator[int]] | None = None

    def __enter__(self) -> MixedBatch:
        self._handles = [part.register_forward_pre_hook(self._hand_over, with_kwargs=True) for part in self._parts]
        self._handles.append(self._model.register_forward_pre_hook(self._check, with_kwargs=True))
        self._tell(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._tell(None)
        for handle in self._handles:
            handle.remove()

    def _tell(self, batch: MixedBatch | None) -> None:
        for part in self._parts:
            part._mixed = batch

    def _hand_over(self, part: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs if part._mixed is None else {**kwargs, "adapter_names": self.adapter_names}

    def _check(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if any(part._mixed is None for part in self._parts):
            return  # one example is being run alone
        batch = batch_size(args, kwargs)
        if batch == len(self._repeated):
            self.adapter_names = self._repeated
        check_number(self.adapter_names, batch)
        self._rows_alone = None
        if batch is not None and not self._checked:  # once is enough for all steps of a generation
            self._checked = True
            self._tell(None)
            try:
                rows = _rows_of_one_example(model, self._parts, args, kwargs, batch)
            finally:
                self._tell(self)
            self._rows_alone = {part: iter(rows[part]) for part in self._parts}

    def rows_per_example(self, part: nn.Module, rows: int) -> int:
        """How many consecutive rows of a layer's output are one example's.

        Args:
            part (`nn.Module`): The layer.
            rows (`int`): How many rows it has computed for the batch.

        Raises:
            [`UnsupportedLayerError`]: The rows do not belong to examples.
        """
        batch = len(self.adapter_names)
        each = rows_per_example(rows, batch)
        alone = each if self._rows_alone is None else next(self._rows_alone[part], None)
        if each is None or each != alone:
            raise UnsupportedLayerError(
                f"A {stock_class(stock_module(part)).__name__} layer computes {rows} rows for a batch of {batch} "
                f"examples and {alone or 'other'} for one alone: they do not belong to single examples (a table that "
                "all share, or a batch that is not the first dimension), so `adapter_names` cannot be applied per "
                "example. Run one batch per adapter, or use `bitfit_hf.TaskBank`."
            )
        return each


def check_number(adapter_names: Sequence[str], batch: int | None) -> None:
    """Raises [`AdapterNameError`] if there is not one name for each example; a batch of `None` has no known size."""
    if batch is not None and batch != len(adapter_names):
        raise AdapterNameError(  # in PEFT's words at first, which people look for
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {batch} respectively: `adapter_names` has {len(adapter_names)} names for a "
            f"batch of {batch} examples; give one for each."
        )


def sequences_per_example(kwargs: Mapping[str, Any]) -> int:
    """How many rows of a batch belong to one example, by the arguments of `generate`: beams, or samples."""
    config = kwargs.get("generation_config")
    return max(kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences"))


def check_adapter_names(adapter_names: Sequence[str], known: Sequence[str]) -> None:
    """Raises [`AdapterNameError`] for names of a mixed batch that are no adapters."""
    if isinstance(adapter_names, str):
        raise AdapterNameError(f"`adapter_names` takes a list with one name per example, got {adapter_names!r}.")
    unknown = sorted({str(name) for name in adapter_names} - {*known, BASE})
    if unknown:
        raise AdapterNameError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has the adapters "
            f"{sorted(known)}. "
            f'Load them first (`model.load_adapter(…, adapter_name="{unknown[0]}")`), or use "{BASE}" for the base.'
        )


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many examples a call of a model's forward is about; `None` where it gets no tensor."""
    named = [kwargs[name] for name in _MAIN_INPUTS if name in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


@torch.no_grad()
def _rows_of_one_example(
    model: nn.Module, parts: Sequence[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any], batch: int
) -> dict[nn.Module, list[int]]:
    """Runs the first example of a batch alone, and counts the rows that each layer computes for it, call by call."""

    def first(_: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:1] if tensor.dim() > 0 and tensor.shape[0] == batch else tensor

    alone = {name: value for name, value in kwargs.items() if name != "past_key_values"}
    if kwargs.get("past_key_values") is not None:  # it would be written to
        alone["use_cache"] = False
    rows: dict[nn.Module, list[int]] = defaultdict(list)

    def count(part: nn.Module, inputs: Any, output: Any) -> None:
        rows[part].append(next(iter(tensors(output).values())).shape[0])

    handles = [part.register_forward_hook(count) for part in parts]
    try:
        args, alone = rebuild((tuple(args), alone), first)
        model(*args, **alone)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def pick_rows(results: Mapping[str, Any], adapter_names: Sequence[str], count_rows: Callable[[int], int]) -> Any:
    """Takes each example's rows from the result of its own adapter.

    Args:
        results (`Mapping[str, Any]`): What a layer computed for the whole batch, by adapter.
        adapter_names (`Sequence[str]`): One per example.
        count_rows (`Callable`): From the number of rows to that of one example's rows.

    Returns:
        What the layer returns: a tensor, or a tuple or list with tensors.
    """
    by_adapter = {name: tensors(result) for name, result in results.items()}
    first = next(iter(results))
    if not by_adapter[first]:
        return results[first]
    each = count_rows(next(iter(by_adapter[first].values())).shape[0])

    def picked(path: Any, _: torch.Tensor) -> torch.Tensor:
        parts = [by_adapter[name][path] for name in adapter_names]
        return torch.cat([part[i * each : (i + 1) * each] for i, part in enumerate(parts)])

    return rebuild(results[first], picked)
