"""[`BankedLayer`]: a layer of the bank's base that adds each example's own delta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import TaskBankError
from ..tuner.layer import channel_axis, reads_bias
from ..tuner.reading import install, stock_class
from .batch import Batch, current
from .sites import Site

_SMALL_OUTPUT = 1 << 20  # values; below it copying row by row is faster, above it what all threads share


class BankedLayer:
    """Takes over the forward of one layer.

    Outside a batch the layer computes as it always did. In a batch of one task, or where a layer is run for one task
    at a time, whoever reads its bias gets that task's `b_0 + δ` (see [`bitfit_hf.tuner.reading`]). In a mixed batch
    each example gets its own: a plain Linear starts its product from the examples' biases instead of from one bias,
    which costs no pass over the activations; other layers add the deltas to their output.

    Args:
        path (`str`): The layer's path in the base.
        layer (`nn.Module`): The layer, of the bank's own copy of the base.
        sites (`Mapping[str, Site]`): Its biases, by parameter name.
    """

    def __init__(self, path: str, layer: nn.Module, sites: Mapping[str, Site]) -> None:
        self.path = path
        self.layer = layer
        self.sites = dict(sites)
        self.bias_parameters = tuple(sites)
        self.batch_axis: int | None = None  # of the output; set once a trial run has shown it
        self.reached = False
        self._channel_axis = channel_axis(layer)
        self._own_forward = layer.forward
        self._stock = stock_class(layer)
        self._transposed = self._stock is nn.Linear
        self._single = len(self.sites) == 1
        self._site = next(iter(self.sites.values()))
        self._product = self._stock in (nn.Linear, Conv1D) and "forward" not in vars(layer) and _is_plain(layer)
        self._read = tuple(name for name in self.sites if reads_bias(layer, name))
        if self._read:
            install(layer, self._read, owner=self)
        bias = self.base_bias("bias") if self._product and self._site.held is None else None
        if bias is not None and bias.dtype is torch.float32 is self._site.table.dtype:
            self._site.hold(bias)
        layer.forward = self.forward  # type: ignore[method-assign]

    @property
    def adds_at_output(self) -> bool:
        """Whether all that the layer does with its biases is to add one to its output."""
        return tuple(self.sites) == ("bias",) and self._channel_axis is not None

    @property
    def channel_axis(self) -> int | None:
        """Dimension of the output along which the bias lies."""
        return self._channel_axis

    def base_bias(self, parameter: str) -> torch.Tensor | None:
        """`b_0`."""
        return self.layer._parameters.get(parameter)

    def stored_biases(self) -> list[torch.Tensor]:
        """`b_0` of each of its biases that the base has."""
        return [bias for bias in map(self.base_bias, self.sites) if bias is not None]

    def effective_bias(self, parameter: str, base: torch.Tensor | None) -> torch.Tensor | None:
        """What a reader of the layer's bias gets."""
        batch = current()
        if batch is None or parameter not in self.sites:
            return base
        site = self.sites[parameter]
        if batch.alone is not None:
            row = batch.alone.rows[site.number]
            return site.effective(row, base, self._dtype(base)) if row else base
        if batch.within is self:
            return base
        if batch.strangers is not None:
            batch.strangers.add(self)
            return base
        if not batch.active[site.number]:
            return base
        raise TaskBankError(
            f"The `{parameter}` of {self.path} ({self._stock.__name__}) is read by code that the bank's trial run did "
            "not see, so the tasks of this batch cannot be told apart there. Ask for one task per call, or make the "
            "bank with `example_inputs=` like those of this call."
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward."""
        batch = current()
        if batch is None:
            return self._own_forward(*args, **kwargs)
        if batch.alone is not None:
            result = self._own_forward(*args, **kwargs)
            return result if self._read else self._add_one(batch, result)
        if batch.strangers is not None or not self._tuned_in(batch):
            return batch.call_within(self, self._own_forward, *args, **kwargs)
        if self.batch_axis is None:
            raise TaskBankError(
                f"{self.path} ({self._stock.__name__}) was not reached in the bank's trial run, so it is not known "
                "which rows of its output belong to which example. Make the bank with `example_inputs=` like those of "
                "this call."
            )
        if self._product and self.batch_axis == 0 and len(args) == 1 and not kwargs:
            x, weight = args[0], self.layer._parameters["weight"]
            assert weight is not None
            if x.dtype is weight.dtype and not torch.is_autocast_enabled(x.device.type):
                return self._product_per_example(batch, x, weight)
        return self._add_rows(batch, batch.call_within(self, self._own_forward, *args, **kwargs))

    def _product_per_example(self, batch: Batch, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        device, site, shape = x.device, self._site, x.shape
        each = self._fold(batch, shape[0]) * shape[1:-1].numel()
        tokens = each * batch.size
        small = tokens * site.size <= _SMALL_OUTPUT
        if small and site.held is not None:
            start = site.table.index_select(0, batch.rows(site.number, device, each))
        else:
            biases = site.effective_rows(batch.rows(site.number, device), self.layer._parameters["bias"], x.dtype)
            if small:
                start = biases.index_select(0, batch.folded(each, device))
            else:
                start = biases.unsqueeze(1).expand(-1, each, -1).reshape(tokens, site.size)
        matrix = weight.t() if self._transposed else weight
        return start.addmm_(x.reshape(tokens, -1), matrix).view(*shape[:-1], site.size)

    def _tuned_in(self, batch: Batch) -> bool:
        """Whether some task of a mixed batch tunes the layer."""
        active = batch.active
        if self._single:  # nearly every layer; the general form takes as long as a small operation
            return active[self._site.number]
        return any(active[site.number] for site in self.sites.values())

    def _add_rows(self, batch: Batch, result: torch.Tensor) -> torch.Tensor:
        site = self._site
        assert self.batch_axis is not None
        assert self._channel_axis is not None
        rows = site.delta_rows(batch.rows(site.number, result.device))
        factor = self._fold(batch, result.shape[self.batch_axis])
        if factor > 1:  # windows, patches or choices that are folded into the batch
            rows = rows.index_select(0, batch.folded(factor, rows.device))
        shape = [1] * result.dim()
        shape[self.batch_axis], shape[self._channel_axis] = rows.shape
        return result.add_(rows.view(shape))

    def _add_one(self, batch: Batch, result: torch.Tensor) -> torch.Tensor:
        """For a layer that never reads a bias, a norm that was defined without one."""
        assert batch.alone is not None
        for site in self.sites.values():
            row = batch.alone.rows[site.number]
            if row:
                result = result + site.effective(row, None, result.dtype)
        return result

    def _fold(self, batch: Batch, rows: int) -> int:
        factor, rest = divmod(rows, batch.size)
        if rest or not factor:
            raise TaskBankError(
                f"{self.path} ({self._stock.__name__}) computes {rows} rows for a batch of {batch.size} examples, so "
                "it is not known which belong to which. Ask for one task per call."
            )
        return factor

    def _dtype(self, base: torch.Tensor | None) -> torch.dtype:
        if base is not None:
            return base.dtype
        weight = getattr(self.layer, "weight", None)
        # `compute_dtype` is that of bitsandbytes' 4-bit layers, whose weight is stored as integers.
        dtype: Any = getattr(self.layer, "compute_dtype", None) or getattr(weight, "dtype", torch.float32)
        return dtype if dtype.is_floating_point else torch.float32


def _is_plain(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.is_floating_point()
