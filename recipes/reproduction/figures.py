"""Figure 1 (bias change), Figure 2 (SQuAD by training-set size) and the generalization gap: Markdown and PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfit_hf import plot_bias_change

from . import paper
from .aggregate import best_run, choose, reported, runs_at, summarize
from .markdown import Context, document, figure, percent, table
from .plan import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "figure1": "Figure 1: how far training moves each bias",
    "figure2": "Figure 2: SQuAD exact match by the size of the training set",
    "generalization_gap": "Generalization gap: scores on training rows and on the dev set",
}
# A method has the same colour in every picture. BitFit is blue, as in Figure 1: pale with one rate, full by default.
COLORS = {
    "full": "#b5532a",
    "bitfit": "#8ab4de",
    "bitfit_default": "#1f5fa8",
    "lora": "#3c8d5a",
    "adapter": "#8a6bb1",
    "diff_pruning": "#c9a227",
    "frozen": "#8c8c8c",
}


def render_figure(study: str, cells: Sequence[Cell], context: Context) -> dict[str, bytes]:
    """A figure as it is with the runs that are there.

    Args:
        study (`str`): A key of `TITLES`.
        cells (`Sequence[Cell]`): Its cells.
        context ([`Context`]): Runs and configuration.

    Returns:
        `dict[str, bytes]`: Files by name: the Markdown and, as soon as there is anything to draw, the picture.
    """
    body, picture = {"figure1": _bias_change, "figure2": _by_size, "generalization_gap": _gap}[study](cells, context)
    files = {}
    if picture is not None:
        files[f"{study}.png"] = as_png(picture)
        body = [f"![{TITLES[study]}]({study}.png)", "", *body]
    files[f"{study}.md"] = document(TITLES[study], context, study, cells, body).encode()
    return files


def as_png(picture: Figure) -> bytes:
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def new_axes(panels: int, across: int | None = None) -> tuple[Figure, list]:
    """
    An empty picture of some panels, apart from matplotlib's global state.

    Args:
        panels (`int`): How many.
        across (`int`, *optional*): How many in a row; all of them by default.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, across or panels)
    rows = -(-panels // columns)
    picture = Figure(figsize=(2.6 + 4.2 * columns, 0.4 + 3.0 * rows), layout="constrained")
    FigureCanvasAgg(picture)
    axes = list(picture.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return picture, axes[:panels]


def shared_legend(picture: Figure, axes: Sequence[Any]) -> None:
    """One legend for all panels, beside them, where it hides no curve."""
    shown: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    picture.legend(shown.values(), shown.keys(), loc="outside right center", frameon=False, fontsize=8)


def _bias_change(cells: Sequence[Cell], context: Context) -> tuple[list[str], Figure | None]:
    body, picture = [paper.FIGURE_1, ""], None
    for cell in cells:
        stored = best_run(cell, context.store, context.score)
        if stored is None or not stored.bias_change:
            continue
        rows = stored.changes()
        if picture is None:
            picture = plot_bias_change(rows, title=f"{cell.model.name}, {cell.task.name}")
        averages = sorted(rows.averages().items(), key=lambda entry: -entry[1])
        symbols = {row.term: row.symbol for row in rows}
        lines = [["term", "mean change over the layers", "relative to b_q"]]
        query = next((value for (_, term), value in averages if term == "query"), math.nan)
        for (stack, term), value in averages:
            lines.append([f"{stack} {symbols[term]}".strip(), f"{value:.6f}", f"{value / query:.3f}"])
        body += [
            f"{cell.model.name} on {cell.task.name}, learning rate {stored.spec['learning_rate']:g}, seed "
            f"{stored.spec['seed']} (run `{stored.id}`): ‖b_0 − b_F‖₁ / dim(b), largest first.",
            "",
            table(lines),
            "",
        ]
    return body, picture


def _by_size(cells: Sequence[Cell], context: Context) -> tuple[list[str], Figure | None]:
    methods = list(dict.fromkeys(cell.method.name for cell in cells))
    models = list(dict.fromkeys(cell.model.name for cell in cells))
    columns = [(method, heading) for heading in cells[0].task.columns for method in methods]
    heads = [f"{paper.method_name(method)} {heading}" for method, heading in columns]
    lines = [["model", "training questions", *heads]]
    points: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for model in models:
        by_size = sorted({cell.task.train_rows or 0 for cell in cells if cell.model.name == model})
        for size in by_size:
            row = [model, f"{size:,}"]
            for method, heading in columns:
                cell = next(
                    (
                        c
                        for c in cells
                        if (c.model.name, c.method.name, c.task.train_rows or 0) == (model, method, size)
                    ),
                    None,
                )
                if cell is None:
                    row.append("")
                    continue
                summary = summarize(cell, context.store, cell.task.columns[heading], context.score)
                row.append(figure(summary))
                if heading == next(iter(cell.task.columns)) and summary.values and not math.isnan(summary.mean):
                    points.setdefault((model, method), []).append(
                        (size, summary.mean, math.nan if summary.std is None else summary.std)
                    )
            lines.append(row)
    floors = sorted({cell.task.arguments.get("min_steps", 0) for cell in cells})
    floor = " or ".join(f"{steps:,}" for steps in floors if steps)
    body = [paper.FIGURE_2, ""]
    if floor:
        body += [f"Every size is trained for at least {floor} steps, so that small subsets are not under-trained.", ""]
    body += [table(lines, left=1), ""]
    if not points:
        return body, None
    picture, (axis,) = new_axes(1)
    for (model, method), found in points.items():
        sizes, means, deviations = (np.array(values) for values in zip(*found))
        label = paper.method_name(method) if len(models) == 1 else f"{model}, {paper.method_name(method)}"
        axis.plot(sizes, 100 * means, marker="o", color=COLORS.get(method), label=label)
        several = np.isfinite(deviations)  # of a single seed there is no deviation to draw
        if several.any():
            bars = sizes[several], 100 * means[several], 100 * deviations[several]
            axis.errorbar(*bars, fmt="none", capsize=3, color=COLORS.get(method))
    axis.set_xscale("log")
    ticks = sorted({size for found in points.values() for size, *_ in found})
    axis.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axis.minorticks_off()  # the powers of ten that a log scale writes run into each other
    axis.set_xlabel("training questions")
    axis.set_ylabel("exact match")
    shared_legend(picture, [axis])
    return body, picture


@dataclass(frozen=True)
class Gap:
    """Scores of one run by epoch, on training rows and on the dev set, from 0 to 1."""

    epochs: tuple[float, ...]
    train: tuple[float, ...]
    dev: tuple[float, ...]

    @property
    def final(self) -> float:
        """Training score minus dev score after the last epoch."""
        return self.train[-1] - self.dev[-1]


def gaps(cell: Cell, context: Context) -> list[Gap]:
    """The curves of a cell's runs at the chosen learning rate, by seed; of those that evaluated on training rows."""
    choice = choose(cell, context.store, context.score)
    if choice is None:
        return []
    metric, unit = cell.task.metric, 0.01 if cell.task.in_percent else 1.0
    found = []
    for stored in runs_at(cell, context.store, choice.learning_rate):
        entries = [entry for entry in stored.record["history"] if entry.get("train")]
        dev = reported(cell.task, metric)
        scores = [(entry["epoch"], entry["train"][metric], entry["eval"][dev]) for entry in entries]
        scores = [(epoch, unit * train, unit * dev) for epoch, train, dev in scores if None not in (train, dev)]
        if scores:
            found.append(Gap(*zip(*scores)))
    return found


def _gap(cells: Sequence[Cell], context: Context) -> tuple[list[str], Figure | None]:
    body = [paper.GENERALIZATION_GAP, ""]
    lines = [["model", "task", "method", "training rows", "dev set", "gap", "n"]]
    curves: dict[tuple[str, str], dict[str, list[Gap]]] = {}
    for cell in cells:
        found = gaps(cell, context)
        place = [cell.model.name, cell.task.name, paper.method_name(cell.method.name)]
        if not found:
            lines.append([*place, "–", "–", "–", "0"])
            continue
        curves.setdefault((cell.model.name, cell.task.name), {})[cell.method.name] = found
        gap = percent(float(np.mean([one.final for one in found])))
        if len(found) > 1:
            gap += f" ± {100 * float(np.std([one.final for one in found], ddof=1)):.1f}"
        scores = [percent(float(np.mean(values))) for values in zip(*((one.train[-1], one.dev[-1]) for one in found))]
        lines.append([*place, *scores, gap, str(len(found))])
    body += ["After the last epoch, at the chosen learning rate; the gap is the difference.", "", table(lines, 3), ""]
    if not curves:
        return body, None
    picture, axes = new_axes(len(curves))
    for axis, ((model, task), by_method) in zip(axes, curves.items()):
        for method, found in by_method.items():
            color = COLORS.get(method)
            for index, one in enumerate(found):
                name = paper.method_name(method)
                labels = (f"{name}, training rows", f"{name}, dev set") if index == 0 else (None, None)
                axis.plot(one.epochs, np.multiply(100, one.train), "--", color=color, label=labels[0])
                axis.plot(one.epochs, np.multiply(100, one.dev), "-", color=color, label=labels[1])
        axis.set_title(f"{model}, {task}", fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_xticks(sorted({epoch for found in by_method.values() for one in found for epoch in one.epochs}))
    axes[0].set_ylabel("score")
    shared_legend(picture, axes)
    return body, picture
