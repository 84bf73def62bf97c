"""[`BitsAndBytesLayer`]: a tuned layer of bitsandbytes, whose forward writes to the bias that it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layer import BitFitLayer, stock_class


class BitsAndBytesLayer(BitFitLayer):
    """
    A [`BitFitLayer`] around a layer of bitsandbytes.

    Those cast `bias.data` to their input's dtype in place, for good. That would change the base's stored bias wherever
    it is read as it is, with adapters disabled or merged, so they are shown an alias of it.
    """

    _input_dtype: torch.dtype | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if stock_class(self.base_layer).__name__ == "Linear8bitLt":
            # It casts what it reads first and computes with what it reads next, so both have to be cast already.
            self._input_dtype = args[0].dtype
        return super().forward(*args, **kwargs)

    def effective_bias(self, parameter: str, base: torch.Tensor | None) -> torch.Tensor | None:
        bias = super().effective_bias(parameter, base)
        if bias is None or bias.is_meta:
            return bias
        if self._input_dtype is not None and bias.dtype != self._input_dtype:
            return bias.to(self._input_dtype)
        stored = (base, self.base_bias(parameter))
        return bias.view_as(bias) if any(bias is tensor for tensor in stored) else bias


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Whether `layer` comes from bitsandbytes, also as a subclass."""
    return any(cls.__name__ in ("Linear8bitLt", "Linear4bit") for cls in type(layer).__mro__)
