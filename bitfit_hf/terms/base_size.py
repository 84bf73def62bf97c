"""How large the base model is, whatever has been injected into it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .heads import part_of
from .structure import shape_of, stock_root, walk


def num_base_parameters(model: nn.Module, head: list[str], *, base_rows: Mapping[str, int] | None = None) -> int:
    """How many parameters the stock model has outside its task head, whatever is injected; tied ones count once.

    Of tensors in `base_rows`, see [`fingerprint`], so many rows count.
    """
    parameters: dict[int, int] = {}
    for path, module in walk(stock_root(model)):
        for own_name, parameter in module._parameters.items():
            name = f"{path}.{own_name}" if path else own_name
            if parameter is not None and part_of(name, head) is None:
                count, rows = _numel(parameter), (base_rows or {}).get(name)
                parameters[id(parameter)] = count if rows is None else count // shape_of(parameter)[0] * rows
    return sum(parameters.values())


def _numel(parameter: torch.Tensor) -> int:
    # bitsandbytes packs two 4-bit values into a byte; DeepSpeed leaves an empty parameter behind.
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * parameter.element_size() * 2
    return parameter.numel() or getattr(parameter, "ds_numel", 0)
