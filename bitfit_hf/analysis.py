"""What training has changed: the paper's Figure 1 as numbers, and parameter counts by term."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import BitFitConfig
from .delta.value import BiasDelta
from .errors import AdapterNameError
from .storage.bias_layout import decode_layout
from .terms import SYMBOLS, TERMS, Bias
from .terms.survey import span_index

UNIT = "‖b_0 − b_F‖₁ / dim(b)"


@dataclass(frozen=True)
class BiasChangeRow:
    """
    By how much one bias term has changed in one layer.

    Args:
        term (`str`): One of `bitfit_hf.terms.TERMS`.
        symbol (`str`): The paper's symbol, `"b_q"`; for terms that it has no symbol for, the term itself.
        layer (`int`, *optional*): Running number of the layer in its stack, from 0; `None` for terms outside layers.
        stack (`str`): `""`, or `"encoder"`, `"decoder"`, … where a model has several.
        value (`float`): `‖b_0 − b_F‖₁ / dim(b)`, in the unit of the bias itself.
        size (`int`): `dim(b)`: how many scalars.
    """

    term: str
    symbol: str
    layer: int | None
    stack: str
    value: float
    size: int


class BiasChange(list[BiasChangeRow]):
    """The rows of [`bias_change`]: by stack, then in the order of the paper's terms, then by layer."""

    @property
    def stacks(self) -> list[str]:
        """The stacks that occur, in the model's order."""
        return list(dict.fromkeys(row.stack for row in self))

    def averages(self) -> dict[tuple[str, str], float]:
        """Mean over the layers, by stack and term. Terms outside layers have none."""
        values: dict[tuple[str, str], list[float]] = {}
        for row in self:
            if row.layer is not None:
                values.setdefault((row.stack, row.term), []).append(row.value)
        return {place: sum(found) / len(found) for place, found in values.items()}

    def largest(self, count: int = 5) -> list[BiasChangeRow]:
        """The `count` rows with the largest change, the largest first."""
        return sorted(self, key=lambda row: -row.value)[:count]

    def table(self) -> str:
        """The rows as text in columns, with the average behind the layers of each term."""
        averages = self.averages()
        lines = [("stack", "term", "layer", "change", "size")]
        for index, row in enumerate(self):
            layer = "-" if row.layer is None else str(row.layer)
            lines.append((row.stack or "-", row.symbol, layer, f"{row.value:.6f}", f"{row.size:,}"))
            following = self[index + 1] if index + 1 < len(self) else None
            same = following is not None and (following.stack, following.term) == (row.stack, row.term)
            if row.layer is not None and not same:
                average = averages[row.stack, row.term]
                lines.append((row.stack or "-", row.symbol, "mean", f"{average:.6f}", ""))
        columns = range(1 if self.stacks in ([], [""]) else 0, len(lines[0]))
        widths = {column: max(len(line[column]) for line in lines) for column in columns}
        return "\n".join(
            "  ".join(line[c].rjust(widths[c]) if c >= 2 else line[c].ljust(widths[c]) for c in columns).rstrip()
            for line in lines
        )


def bias_change(
    x: BiasDelta | nn.Module | str | os.PathLike[str], adapter_name: str = "default", **hub_kwargs: Any
) -> BiasChange:
    r"""
    How far training has moved each bias: `‖b_0 − b_F‖₁ / dim(b)` for each term and layer, the paper's Figure 1.

    Several tensors of one term in one layer (gate and up of a gated MLP, self- and cross-attention) are taken
    together: the sum of their absolute changes over the sum of their sizes. Of a fused vector each term is its own
    slice.

    Args:
        x ([`BiasDelta`], `nn.Module`, `str` or `os.PathLike`):
            A delta, a model with BitFit adapters, or the folder or Hub repo of a delta. The base is not needed.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter of a model.
        hub_kwargs: As for [`BiasDelta.from_pretrained`]: `revision`, `subfolder`, `token`, ….

    Returns:
        [`BiasChange`]: A list of [`BiasChangeRow`].

    Raises:
        [`BitFitError`]: There is no delta in `x`.

    Example:

    ```python
    >>> print(bias_change("user/bert-base-rte-bitfit").table())
    ```
    """
    delta = as_delta(x, adapter_name, **hub_kwargs)
    sums: dict[tuple[str, str, int | None], float] = {}
    sizes: dict[tuple[str, str, int | None], int] = {}
    for name, biases in delta.biases.items():
        for bias, values in zip(biases, pieces(delta[name], biases), strict=True):
            place = (bias.stack, bias.term, bias.layer)
            sums[place] = sums.get(place, 0.0) + values.double().abs().sum().item()
            sizes[place] = sizes.get(place, 0) + values.numel()

    stacks = _in_order(stack for stack, _, _ in sums)
    order = sorted(sums, key=lambda p: (stacks.index(p[0]), TERMS.index(p[1]), -1 if p[2] is None else p[2]))
    return BiasChange(
        BiasChangeRow(
            term=place[1],
            symbol=SYMBOLS[place[1]],
            layer=place[2],
            stack=place[0],
            value=sums[place] / sizes[place],
            size=sizes[place],
        )
        for place in order
    )


@dataclass(frozen=True)
class ParameterCount:
    """
    How many scalars a delta holds.

    Args:
        terms (`dict[str, int]`): By bias term, in the order of the paper; terms without any are left out.
        head (`int`, *optional*): Of the task head; `None` where that is not known.
        tokens (`int`, *optional*, defaults to 0): Of the rows of added tokens.
    """

    terms: dict[str, int]
    head: int | None = None
    tokens: int = 0

    @property
    def biases(self) -> int:
        """Bias parameters, without the head: what published percentages count."""
        return sum(self.terms.values())

    @property
    def total(self) -> int | None:
        """Biases, head and added tokens; `None` where the head's size is not known."""
        return None if self.head is None else self.biases + self.head + self.tokens


def term_counts(
    x: BiasDelta | BitFitConfig | nn.Module | str | os.PathLike[str],
    adapter_name: str = "default",
    **hub_kwargs: Any,
) -> ParameterCount:
    """Counts the parameters that a delta trains, by bias term, with and without the head.

    Args:
        x ([`BiasDelta`], [`BitFitConfig`], `nn.Module`, `str` or `os.PathLike`):
            A delta, its configuration (which does not know the head's size), a tuned model, a folder or a Hub repo.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter of a model.
        hub_kwargs: As for [`BiasDelta.from_pretrained`].

    Returns:
        [`ParameterCount`].

    Example:

    ```python
    >>> term_counts("user/bert-base-rte-bitfit").biases
    102912
    ```
    """
    if isinstance(x, BitFitConfig):
        biases, head, tokens = decode_layout(x.bias_layout or {}), None, 0
    else:
        delta = as_delta(x, adapter_name, **hub_kwargs)
        biases = [bias for group in delta.biases.values() for bias in group]
        head, tokens = (sum(tensor.numel() for tensor in group.values()) for group in (delta.head, delta.added))
    counts = {term: sum(bias.num_parameters for bias in biases if bias.term == term) for term in TERMS}
    return ParameterCount({term: count for term, count in counts.items() if count}, head, tokens)


def as_delta(
    x: BiasDelta | nn.Module | str | os.PathLike[str], adapter_name: str = "default", **hub_kwargs: Any
) -> BiasDelta:
    """The delta that `x` is, has, or names.

    Raises:
        [`AdapterNameError`]: `x` is no model with BitFit adapters, nor anything else that has a delta.
    """
    if isinstance(x, BiasDelta):
        return x
    if isinstance(x, nn.Module):
        return BiasDelta.from_model(x, adapter_name)
    if isinstance(x, (str, os.PathLike)):
        return BiasDelta.from_pretrained(x, **hub_kwargs)
    raise AdapterNameError(
        f"Got a {type(x).__name__}, which has no delta. Pass a BiasDelta, a tuned model, or the folder or Hub repo of "
        "a delta."
    )


def pieces(tensor: torch.Tensor, biases: Sequence[Bias]) -> list[torch.Tensor]:
    """The part of one tensor of a delta that belongs to each of the terms in it."""
    index = span_index(biases)
    whole = tensor.flatten()
    if index is not None:
        whole = torch.zeros(math.prod(biases[0].shape), dtype=tensor.dtype, device=tensor.device)
        whole[index.to(tensor.device)] = tensor.flatten()
    return [torch.cat([whole[start:stop] for start, stop in bias.spans]) for bias in biases]


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
