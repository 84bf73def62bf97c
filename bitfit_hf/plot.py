"""The paper's Figure 1 as a picture."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .analysis import BiasChange, bias_change
from .delta.value import BiasDelta
from .errors import MissingDependencyError
from .storage.files import PICTURE_FILE, write_bytes
from .terms import SYMBOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WORDS = {"embedding_layernorm": "emb. LN", "lm_head": "LM head"}
_COLORS = "Blues"
_CELL = (0.42, 0.3)  # inches
_NARROW = 0.24  # width of a cell where there are many layers
_MANY_LAYERS = 16
_BESIDE = 1.6  # room for a value beside the last column, in cells
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
    pooler, LM head) have a single cell in the last column, with its value written beside it; the scale is that of the
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
    width = max(2.6 + cell * (max(layers) + 2 + _BESIDE), 5.0)
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
    axis.set_xlim(-0.5, layers + gap + 0.5 + (_BESIDE if layers and alone else 0.0))
    for row in alone:
        # Beside the cell: to the left of it, under the last layer, a value would be taken for that layer's.
        axis.text(
            layers + gap + 0.6 if layers else 0.0,
            lines.index((row.term, True)),
            f"{row.value:.2g}",
            ha="left" if layers else "center",
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
