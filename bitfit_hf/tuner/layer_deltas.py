"""[`LayerDeltas`]: the deltas of one layer's biases, one per adapter, and their sum with what is stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..backends.sharded import lent
from ..storage.keys import PREFIX
from ..terms.base_bias import add_deltas
from .layer_kinds import compute_dtype, out_features, reads_bias
from .precision import Float32ParameterDict


class LayerDeltas(nn.Module):
    """
    A layer of the base model, and the deltas that adapters have for its biases.

    Args:
        base_layer (`nn.Module`): The layer.
        parameters (`Sequence[str]`): Names of its bias parameters that may be tuned.
    """

    _active_adapter: str | list[str]  # PEFT's

    def __init__(self, base_layer: nn.Module, parameters: Sequence[str]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bias_parameters = tuple(parameters)
        for name in self.bias_parameters:
            setattr(self, PREFIX + name, Float32ParameterDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._only: tuple[str, ...] | None = None  # overrides the active adapters while a mixed batch runs
        self._adds_to_output = any(not reads_bias(base_layer, name) for name in self.bias_parameters)

    # This runs for every layer in every forward pass, and its time shows with a small model or on a fast device. So
    # plain attributes are read instead of properties, and casts that change nothing are not called.

    @property
    def adapters_in_use(self) -> Sequence[str]:
        """The adapters whose deltas the layer computes with at this moment."""
        if self._only is not None:
            return self._only
        if self._disable_adapters or self.merged_adapters:
            return ()
        active = self._active_adapter
        return (active,) if isinstance(active, str) else active

    def _sum(self, parameter: str, base: torch.Tensor | None, names: Sequence[str]) -> torch.Tensor:
        deltas, layer = self._deltas(parameter), self.base_layer
        return add_deltas(
            base,
            [(lent(deltas[name], layer), self._index(parameter, name)) for name in names],
            dtype=compute_dtype(layer) if base is None else base.dtype,
            shape=() if base is not None else (out_features(layer),),
        )

    def _add_to_output(self, result: torch.Tensor) -> torch.Tensor:
        for parameter in self.bias_parameters:
            names = [name for name in self.adapters_in_use if name in self._deltas(parameter)]
            if names:
                result = result + self._sum(parameter, None, names).to(result.dtype)
        return result

    def _deltas(self, parameter: str) -> Float32ParameterDict:
        return self._modules[PREFIX + parameter]  # type: ignore[return-value]  # getattr takes three times as long

    def _index(self, parameter: str, adapter_name: str) -> torch.Tensor | None:
        return self._buffers.get(index_name(parameter, adapter_name))

    def _stored_bias(self, parameter: str) -> torch.Tensor | None:
        return self.base_layer._parameters.get(parameter)


def index_name(parameter: str, adapter_name: str) -> str:
    """Name of the buffer with the positions that an adapter's delta covers, where it is not the whole vector."""
    return f"_{PREFIX}{parameter}_index_{adapter_name}"
