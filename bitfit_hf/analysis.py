"""What training has changed: the paper's Figure 1 as numbers and as a picture, and parameter counts by term."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .config import BitFitConfig
from .delta import BiasDelta
from .errors import AdapterNameError, MissingDependencyError
from .files import PICTURE_FILE, write_bytes
from .layout import decode_layout
from .terms import SYMBOLS, TERMS, Bias
from .tuner.layer import span_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        whole = torch.zeros(math.prod(biases[0].shape), dtype=tensor.dtype)
        whole[index] = tensor.flatten()
    return [torch.cat([whole[start:stop] for start, stop in bias.spans]) for bias in biases]


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


# --- the picture ---

_WORDS = {"embedding_layernorm": "emb. LN", "lm_head": "LM head"}
_COLORS = "Blues"
_CELL = (0.42, 0.3)  # inches
_NARROW = 0.24  # width of a cell where there are many layers
_MANY_LAYERS = 16
_LABEL_SIZE, _TICK_SIZE, _VALUE_SIZE = 11, 10, 8


def plot_bias_change(
    x: BiasDelta | BiasChange | nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    adapter_name: str = "default",
    title: str | None = None,
    **hub_kwargs: Any,
) -> Figure:
    r"""
    Draws the paper's Figure 1: a heat map of [`bias_change`], rows = bias terms, columns = layers and their average.

    A model with several stacks gets a panel for each, on one scale of colours. Terms outside the layers (embeddings,
    pooler, LM head) have a single cell in the last column, with its value written in it; the scale is that of the
    layers, so one such value does not wash them out.

    Args:
        x: As for [`bias_change`], or what it returned.
        path (`str` or `os.PathLike`, *optional*):
            File to write; its ending says the format (`.png`, `.svg`, `.pdf`). In a folder the picture is named
            `bias_change.png`, where the model card shows it.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter of a model.
        title (`str`, *optional*): Written above the picture.
        hub_kwargs: As for [`BiasDelta.from_pretrained`].

    Returns:
        `matplotlib.figure.Figure`: It belongs to no window; nothing of matplotlib's global state is touched.

    Raises:
        [`MissingDependencyError`]: matplotlib is not installed.
        [`DeltaIOError`]: The file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Drawing needs matplotlib, which is not installed: pip install 'bitfit-hf[plot]'. "
            "`bias_change(...)` gives the same numbers without it."
        ) from error
    rows = x if isinstance(x, BiasChange) else bias_change(x, adapter_name, **hub_kwargs)
    panels = [BiasChange(row for row in rows if row.stack == stack) for stack in rows.stacks] or [BiasChange()]
    layers = [max((row.layer + 1 for row in panel if row.layer is not None), default=0) for panel in panels]
    lines = [list(dict.fromkeys((row.term, row.layer is None) for row in panel)) for panel in panels]

    cell = _NARROW if max(layers) > _MANY_LAYERS else _CELL[0]
    heights = [_CELL[1] * max(len(names), 1) for names in lines]
    extra = 0.75  # for the tick labels and the title of a panel
    width = max(2.6 + cell * (max(layers) + 2), 5.0)
    height = max(0.5 + sum(heights) + extra * len(panels), 2.6)  # the colour bar's label is that long
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]

    within = [row.value for row in rows if row.layer is not None] or [row.value for row in rows]
    scale = max(within, default=0.0) or 1.0
    for axis, panel, names, count in zip(axes, panels, lines, layers, strict=True):
        _draw_panel(axis, panel, names, count, scale)
        if len(panels) > 1:
            axis.set_title(panel.stacks[0] or "outside the stacks", fontsize=_LABEL_SIZE, loc="left")
    if layers[-1]:
        axes[-1].set_xlabel("layer", fontsize=_LABEL_SIZE)
    over = any(row.value > scale for row in rows)
    colors = ScalarMappable(Normalize(0.0, scale), _COLORS)
    bar = figure.colorbar(colors, ax=list(axes), extend="max" if over else "neither", fraction=0.05, pad=0.02)
    bar.set_label(r"$\|b_0 - b_F\|_1\ /\ \dim(b)$", fontsize=_LABEL_SIZE)
    bar.ax.tick_params(labelsize=_TICK_SIZE)
    bar.ax.ticklabel_format(style="sci", scilimits=(-3, 4))
    if title:
        figure.suptitle(title, fontsize=_LABEL_SIZE + 1)
    if path is not None:
        _save(figure, Path(path))
    return figure


def _draw_panel(axis: Axes, panel: BiasChange, lines: list[tuple[str, bool]], layers: int, scale: float) -> None:
    """One stack: the layers, a gap of half a cell, and the average. Cells that a model does not have stay empty.

    `lines` says what the rows are: a term, and whether it is the part of it outside the layers.
    """
    from matplotlib import colormaps

    cells = torch.full((max(len(lines), 1), layers), math.nan, dtype=torch.float64)
    last = torch.full((max(len(lines), 1), 1), math.nan, dtype=torch.float64)
    alone = [row for row in panel if row.layer is None]
    for row in panel:
        if row.layer is None:
            last[lines.index((row.term, True)), 0] = row.value
        else:
            cells[lines.index((row.term, False)), row.layer] = row.value
    for (_, term), value in panel.averages().items():
        last[lines.index((term, False)), 0] = value

    colors = colormaps[_COLORS].with_extremes(bad="0.94")  # of what is not there; zero is nearly white
    gap = 0.5 if layers else 0.0
    for values, left in ((cells, 0.0), (last, layers + gap)):
        if values.shape[1]:
            axis.imshow(
                values.numpy(),
                extent=(left - 0.5, left + values.shape[1] - 0.5, values.shape[0] - 0.5, -0.5),
                cmap=colors,
                vmin=0.0,
                vmax=scale,
                aspect="auto",
                interpolation="nearest",
            )
    axis.set_xlim(-0.5, layers + gap + 0.5)
    for row in alone:
        axis.text(
            layers - 0.6 if layers else 0.0,
            lines.index((row.term, True)),
            f"{row.value:.2g}",
            ha="right" if layers else "center",
            va="center",
            fontsize=_VALUE_SIZE + 1,
            color="0.25" if layers or row.value < 0.6 * scale else "white",
        )

    step = next(step for step in (1, 2, 4, 8, 16) if layers / step <= 2 * _MANY_LAYERS)
    ticks = list(range(0, layers, step))
    mean = "mean" if layers else ""
    axis.set_xticks([*ticks, layers + gap], [*map(str, ticks), mean], fontsize=_TICK_SIZE)
    both = {term for term, outside in lines if outside and (term, False) in lines}
    labels = [_label(term) + (" (no layer)" if outside and term in both else "") for term, outside in lines]
    axis.set_yticks(range(len(lines)), labels, fontsize=_LABEL_SIZE)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_yticks([index - 0.5 for index in range(1, len(lines))], minor=True)
    axis.grid(which="minor", axis="y", color="white", linewidth=1.0)
    axis.tick_params(which="minor", length=0)


def _label(term: str) -> str:
    symbol = SYMBOLS[term]
    if symbol == term:
        return _WORDS.get(term, term)
    return rf"$b_{{\mathrm{{{symbol.removeprefix('b_')}}}}}$"


def _save(figure: Figure, path: Path) -> None:
    if path.is_dir():
        path = path / PICTURE_FILE
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix(".") or "png", dpi=150)
    write_bytes(path, picture.getvalue())
