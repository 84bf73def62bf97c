"""[`BankedLayer`]: a layer of the bank's base that adds each example's own delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import TaskBankError
from ..tuner.layer_kinds import channel_axis, reads_bias
from ..tuner.reading import install, stock_class
from .batch import Batch, current
from .intercept import intercept
from .sites import Site

_SMALL_OUTPUT = 1 << 20  # values; below it copying row by row is faster, above it what all threads share


class BankedLayer:
    """Takes over the forward of one layer.

    In a batch of one task, or where a layer is run for one task at a time, whoever reads its bias gets that task's
    `b_0 + δ` (see [`bitfit_hf.tuner.reading`]). In a mixed batch each example gets its own: a plain Linear starts its
    product from the examples' biases instead of from one bias, which costs no pass over the activations; other layers
    add the deltas to their output.

    Args:
        path (`str`): The layer's path in the base.
        layer (`nn.Module`): The layer, of the bank's own copy of the base.
        sites (`Mapping[str, Site]`): Its biases, by parameter name.
    """

    def __init__(self, path: str, layer: nn.Module, sites: Mapping[str, Site]) -> None:
        self.sites = dict(sites)
        self.batch_axis: int | None = None  # of the output; set once a trial run has shown it
        self.channel_axis = channel_axis(layer)  # of the output: the bias lies along it
        self._layer = layer
        self._stock = stock_class(layer)
        self._title = f"{path} ({self._stock.__name__})"  # for messages
        self._numbers = [site.number for site in self.sites.values()]
        self._site = next(iter(self.sites.values()))
        weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
        plain = type(weight) is nn.Parameter and weight.is_floating_point()
        self._is_product = self._stock in (nn.Linear, Conv1D) and "forward" not in vars(layer) and plain
        self._read = tuple(name for name in self.sites if reads_bias(layer, name))
        if self._read:
            install(layer, self._read, owner=self)
        if self._is_product and self._site.held is None and bias is not None and bias.dtype is torch.float32:
            self._site.hold(bias)
        intercept(layer, self._run)

    @property
    def adds_at_output(self) -> bool:
        """Whether all that the layer does with its biases is to add one to its output."""
        return tuple(self.sites) == ("bias",) and self.channel_axis is not None

    def stored_biases(self) -> list[torch.Tensor]:
        """`b_0` of each of its biases that the base has."""
        found = [self._layer._parameters.get(name) for name in self.sites]
        return [bias for bias in found if bias is not None]

    def effective_bias(self, parameter: str, base: torch.Tensor | None) -> torch.Tensor | None:
        """What a reader of the layer's bias gets."""
        batch = current()
        if batch is None or parameter not in self.sites:
            return base
        site = self.sites[parameter]
        if batch.only_task is not None:
            row = batch.only_task.rows[site.number]
            return site.effective(row, base, self._dtype(base)) if row else base
        if batch.inside is self:
            return base
        if batch.read_outside is not None:
            batch.read_outside.add(self)
            return base
        if not batch.tuned[site.number]:
            return base
        raise TaskBankError(
            f"The `{parameter}` of {self._title} is read by code that the bank's trial run did not see, so the tasks "
            "of this batch cannot be told apart there. Ask for one task per call, or make the bank with "
            "`example_inputs=` like those of this call."
        )

    def _run(self, batch: Batch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if batch.only_task is not None:
            result = forward(*args, **kwargs)
            return result if self._read else self._add_one(batch.only_task.rows, result)
        if batch.read_outside is not None or not self._tuned_in(batch):
            return batch.run_inside(self, forward, *args, **kwargs)
        if self.batch_axis is None:
            raise TaskBankError(
                f"{self._title} was not reached in the bank's trial run, so it is not known which rows of its output "
                "belong to which example. Make the bank with `example_inputs=` like those of this call."
            )
        if self._is_product and self.batch_axis == 0 and len(args) == 1 and not kwargs:
            x, weight = args[0], self._layer._parameters["weight"]
            assert weight is not None
            if x.dtype is weight.dtype and not torch.is_autocast_enabled(x.device.type):
                return self._product_per_example(batch, x, weight)
        return self._add_rows(batch, batch.run_inside(self, forward, *args, **kwargs))

    def _tuned_in(self, batch: Batch) -> bool:
        """Whether some task of a mixed batch tunes the layer."""
        if len(self._numbers) == 1:  # nearly every layer; the general form takes as long as a small operation
            return batch.tuned[self._numbers[0]]
        return any(batch.tuned[number] for number in self._numbers)

    def _product_per_example(self, batch: Batch, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        device, site, shape = x.device, self._site, x.shape
        each = batch.rows_each(shape[0], self._title) * shape[1:-1].numel()
        tokens = each * batch.size
        if site.held is not None and tokens * site.size <= _SMALL_OUTPUT:
            start = site.table.index_select(0, batch.table_rows(site.number, device, each))
        else:
            rows = batch.table_rows(site.number, device)
            biases = site.effective_rows(rows, self._layer._parameters["bias"], x.dtype)
            start = biases.unsqueeze(1).expand(-1, each, -1).reshape(tokens, site.size)
        matrix = weight.t() if self._stock is nn.Linear else weight
        return start.addmm_(x.reshape(tokens, -1), matrix).view(*shape[:-1], site.size)

    def _add_rows(self, batch: Batch, result: torch.Tensor) -> torch.Tensor:
        """Adds each example's delta to what the layer has computed."""
        assert self.batch_axis is not None
        assert self.channel_axis is not None
        each = batch.rows_each(result.shape[self.batch_axis], self._title)
        rows = self._site.delta_rows(batch.table_rows(self._site.number, result.device, each))
        shape = [1] * result.dim()
        shape[self.batch_axis], shape[self.channel_axis] = rows.shape
        return result.add_(rows.view(shape))

    def _add_one(self, rows: Any, result: torch.Tensor) -> torch.Tensor:
        """For a layer that never reads a bias, a norm that was defined without one."""
        for site in self.sites.values():
            if rows[site.number]:
                result = result + site.effective(rows[site.number], None, result.dtype)
        return result

    def _dtype(self, base: torch.Tensor | None) -> torch.dtype:
        if base is not None:
            return base.dtype
        weight = getattr(self._layer, "weight", None)
        # `compute_dtype` is that of bitsandbytes' 4-bit layers, whose weight is stored as integers.
        dtype: Any = getattr(self._layer, "compute_dtype", None) or getattr(weight, "dtype", torch.float32)
        return dtype if dtype.is_floating_point else torch.float32
