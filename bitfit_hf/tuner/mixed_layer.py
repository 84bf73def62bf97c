"""[`MixedBatchLayer`]: a batch whose examples are of several adapters, in one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedLayerError
from .layer_deltas import LayerDeltas
from .layer_kinds import channel_axis, out_features
from .mixed import BASE, MixedBatch, pick_rows


class MixedBatchLayer(LayerDeltas):
    """
    What [`BitFitLayer`] does with one adapter per example.

    The layer computes once without any delta, and each example's δ is added to its rows of the output. Layers that use
    their bias inside run once per adapter, and each example keeps its own rows.
    """

    _mixed: MixedBatch | None = None  # while a mixed batch runs

    @property
    def in_mixed_batch(self) -> bool:
        """Whether a batch runs whose examples are of several adapters."""
        return self._mixed is not None

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Computes with the adapters `names` in place of the active ones, for as long as the context lasts."""
        self._only = tuple(name for name in names if name != BASE)
        try:
            yield
        finally:
            self._only = None

    def rows_per_example(self, rows: int) -> int:
        """How many of `rows` belong to one example: image patches, choices or windows can be folded into the batch."""
        assert self._mixed is not None
        return self._mixed.rows_per_example(self, rows)

    def _mixed_batch_forward(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """One forward pass in which example `i` of the batch is computed with adapter `adapter_names[i]`."""
        if self._disable_adapters:
            with self.using():
                return self.base_layer(*args, **kwargs)
        axis = channel_axis(self.base_layer)
        if axis is None or self.bias_parameters != ("bias",):
            return self._mixed_by_row(adapter_names, *args, **kwargs)
        with self.using():
            result = self.base_layer(*args, **kwargs)
        rows = self._delta_rows(adapter_names, result)
        shape = [1] * result.dim()
        shape[0], shape[axis] = rows.shape[0], rows.shape[1]
        return (result + rows.view(shape)).to(result.dtype)

    def _delta_rows(self, adapter_names: Sequence[str], result: torch.Tensor) -> torch.Tensor:
        """The examples' deltas, `(rows of result, channels)`, float32."""
        base = self._stored_bias("bias")
        width = out_features(self.base_layer) if base is None else base.numel()
        zero = torch.zeros(width, dtype=torch.float32, device=result.device)
        names = list(dict.fromkeys(adapter_names))
        table = torch.stack([self._dense_delta(name, zero) for name in names])
        picked = table[torch.tensor([names.index(name) for name in adapter_names], device=result.device)]
        # Image patches, choices or windows can be folded into the batch dimension, the example outermost.
        factor = self.rows_per_example(result.shape[0])
        return picked if factor == 1 else picked.repeat_interleave(factor, dim=0)

    def _dense_delta(self, name: str, zero: torch.Tensor) -> torch.Tensor:
        deltas = self._deltas("bias")
        if name not in deltas:
            return zero
        index = self._index("bias", name)
        return deltas[name] if index is None else zero.index_add(0, index, deltas[name])

    def _mixed_by_row(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """For layers that use their bias inside: runs the batch once per adapter and keeps each example's rows."""
        if isinstance(self.base_layer, nn.MultiheadAttention) and not self.base_layer.batch_first:
            raise UnsupportedLayerError(
                "A MultiheadAttention layer with `batch_first=False` has the sequence where the batch is looked for, "
                "so `adapter_names` cannot be applied per example. Run one batch per adapter, or use "
                "`bitfit_hf.TaskBank`."
            )
        inside = [part for part in self.base_layer.modules() if isinstance(part, MixedBatchLayer)]
        results = {}
        for name in dict.fromkeys(adapter_names):
            with ExitStack() as stack:
                for part in (self, *inside):
                    stack.enter_context(part.using(name))
                output = self.base_layer(*args, **kwargs)
                results[name] = self._add_to_output(output) if self._adds_to_output else output
        return pick_rows(results, adapter_names, self.rows_per_example)
