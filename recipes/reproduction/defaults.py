"""One setting for everything: BitFit by default, without any choice, against methods whose rate was chosen per task.

What is compared is what a user gets: the default at its one learning rate, the others at the best of their grids.
Beside the scores stand the time that each method takes to come near to full fine-tuning, and runs that have collapsed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import paper
from .aggregate import choose, reported, runs_at, summarize, values_at
from .claims import standard_error
from .figures import COLORS, as_png, new_axes, shared_legend
from .markdown import Context, document, percent, table
from .plan import Cell
from .render import details_table, edges, scores_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ONE_EPOCH_TITLE = "One epoch of BitFit by default against several with one rate for all terms"
TITLE = "One setting for everything: BitFit by default against the best of a grid"
STUDY = "defaults"
ONE_EPOCH = "one_epoch"
OURS = "bitfit_default"
NEAR = 0.95  # of full fine-tuning's score


@dataclass(frozen=True)
class Curve:
    """
    A run by epoch, as the mean over the seeds at the chosen learning rate.

    Args:
        epochs (`tuple[float, ...]`): Where the model was evaluated.
        seconds (`tuple[float, ...]`): Processor time of training until then.
        scores (`tuple[float, ...]`): From 0 to 1, of what is reported.
    """

    epochs: tuple[float, ...]
    seconds: tuple[float, ...]
    scores: tuple[float, ...]

    def first_epoch(self, target: float) -> float | None:
        """The first epoch after which the score is at least `target`."""
        return next((epoch for epoch, score in zip(self.epochs, self.scores) if score >= target), None)

    def seconds_to(self, target: float) -> tuple[float, bool] | None:
        """When the score reaches `target`: seconds, and whether it may have been before.

        Between two evaluations the score is taken to rise in a straight line; before the first one nothing is known.
        """
        before: tuple[float, float] | None = None
        for second, score in zip(self.seconds, self.scores):
            if score >= target:
                if before is None:
                    return second, True
                share = (target - before[1]) / (score - before[1])
                return before[0] + share * (second - before[0]), False
            before = second, score
        return None


def curve(cell: Cell, context: Context) -> Curve | None:
    """The curve of a cell; `None` where there is no run, or one that kept no times."""
    choice = choose(cell, context.store, context.score)
    if choice is None:
        return None
    metric, unit = reported(cell.task, cell.task.metric), 0.01 if cell.task.in_percent else 1.0
    histories = [stored.record["history"] for stored in runs_at(cell, context.store, choice.learning_rate)]
    points = [
        [(entry["epoch"], entry.get("processor_seconds"), entry["eval"].get(metric)) for entry in history]
        for history in histories
    ]
    points = [found for found in points if found and all(None not in point for point in found)]
    if not points or len({len(found) for found in points}) != 1:
        return None
    epochs, seconds, scores = np.mean(np.array(points, dtype=float), axis=0).T
    return Curve(tuple(epochs), tuple(seconds), tuple(unit * scores))


def render_defaults(cells: Sequence[Cell], context: Context) -> dict[str, bytes]:
    """The study as it is with the runs that are there: Markdown and, where runs kept their times, a picture.

    Args:
        cells (`Sequence[Cell]`): Its cells.
        context ([`Context`]): Runs and configuration.
    """
    body = [scores_table(STUDY, cells, context), "", "## The default against the others", ""]
    body += _differences(cells, context)
    body += ["## Runs that have collapsed", "", *_collapsed(cells, context), ""]
    body += ["## Quality and time", "", *_times(cells, context), ""]
    body += ["## Learning rates, sizes and times", "", details_table(cells, context), ""]
    if at_edges := edges(cells, context):
        body += [at_edges, ""]
    files = {}
    picture = _picture(cells, context)
    if picture is not None:
        files[f"{STUDY}.png"] = as_png(picture)
        body = [f"![Score by processor time of training]({STUDY}.png)", "", *body]
    files[f"{STUDY}.md"] = document(TITLE, context, STUDY, cells, body).encode()
    return files


def render_one_epoch(cells: Sequence[Cell], context: Context) -> str:
    """What the default reaches when it is given one epoch, against what one rate for all terms reaches in several.

    A task of the default is compared with the task of [`reproduction.baselines.BitFit`] that has the same columns.

    Args:
        cells (`Sequence[Cell]`): Of both.
        context ([`Context`]): Runs and configuration.

    Returns:
        `str`: Markdown.
    """
    rows = [["model", "task", "BitFit at", "epochs", "score", "n", "by default", "epochs", "score", "n", "difference"]]
    for ours in (cell for cell in cells if cell.method.name == OURS):
        short = summarize(ours, context.store, which=context.score)
        for theirs in cells:
            if theirs.method.name == OURS or (theirs.model, theirs.task.columns) != (ours.model, ours.task.columns):
                continue
            for rate in theirs.learning_rates:
                long = values_at(theirs, context.store, rate, which=context.score)
                if not long or not short.values:
                    continue
                rows.append(
                    [
                        ours.model.name,
                        ", ".join(ours.task.columns),
                        *(f"{rate:g}", f"{theirs.task.arguments['epochs']:g}", percent(float(np.mean(long)))),
                        *(str(len(long)), f"{ours.learning_rates[0]:g}", f"{ours.task.arguments['epochs']:g}"),
                        *(percent(short.mean), str(len(short.values))),
                        _difference(short.values, long)[0],
                    ]
                )
    body = ["No run yet." if len(rows) == 1 else table(rows, 2), ""]
    return document(ONE_EPOCH_TITLE, context, ONE_EPOCH, cells, body)


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[str, float, float | None]:
    """How far our mean over the seeds is above theirs: as a table shows it, and in points with its standard error."""
    difference, error = 100 * float(np.mean(ours) - np.mean(theirs)), standard_error(ours, theirs)
    if error is None:
        return f"{difference:+.1f}", difference, None
    return f"{difference:+.1f} ± {100 * error:.1f}", difference, 100 * error


def _by_method(cells: Iterable[Cell], model: str) -> dict[str, dict[str, Cell]]:
    """The cells of one model, by task and method."""
    found: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        if cell.model.name == model:
            found.setdefault(cell.task.name, {})[cell.method.name] = cell
    return found


def _models(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.model.name for cell in cells))


def _differences(cells: Sequence[Cell], context: Context) -> list[str]:
    """The default minus each other method, in points: by task, and the mean over the tasks that both have."""
    lines: list[str] = []
    for model in _models(cells):
        tasks = _by_method(cells, model)
        others = [m for m in dict.fromkeys(cell.method.name for cell in cells) if m != OURS]
        rows = [["", *tasks, "mean", "tasks"]]
        for other in others:
            row, differences, errors = [f"minus {paper.method_name(other)}"], [], []
            for methods in tasks.values():
                found = [
                    summarize(methods[name], context.store, which=context.score) if name in methods else None
                    for name in (OURS, other)
                ]
                if any(summary is None or not summary.values for summary in found):
                    row.append("–")
                    continue
                ours, theirs = (summary.values for summary in found if summary is not None)
                told, difference, error = _difference(ours, theirs)
                row.append(told)
                differences.append(difference)
                errors.append(error)
            known = [error for error in errors if error is not None]
            mean = f"{float(np.mean(differences)):+.1f}" if differences else "–"
            if differences and len(known) == len(differences):
                mean += f" ± {math.sqrt(sum(error**2 for error in known)) / len(known):.1f}"
            rows.append([*row, mean, str(len(differences))])
        lines += [f"{model}, {paper.method_name(OURS)} …", "", table(rows), ""]
    note = (
        "In points. ± is the standard error of the difference between the seeds' means; without it a side has one "
        "seed, and the noise is not known."
    )
    return [*lines, note, ""]


def _collapsed(cells: Sequence[Cell], context: Context) -> list[str]:
    """Which runs gave one answer to everything at their end, rates that were not chosen included."""
    lines = [["model", "task", "method", "runs", "with one answer at the end"]]
    for cell in cells:
        found = [(run, context.store.get(run)) for run in cell.possible()]
        ends = [(run, stored.record["history"][-1].get("constant")) for run, stored in found if stored is not None]
        told = [f"{run.learning_rate:g} (seed {run.seed})" for run, constant in ends if constant]
        if told:
            place = [cell.model.name, cell.task.name, paper.method_name(cell.method.name)]
            lines.append([*place, str(len(ends)), ", ".join(told)])
    return [table(lines, 3)] if len(lines) > 1 else ["None."]


def _times(cells: Sequence[Cell], context: Context) -> list[str]:
    """When each method comes near to full fine-tuning, and when the default is where one rate for all ends."""
    curves = {id(cell): curve(cell, context) for cell in cells}
    rows = [["model", "task", "method", "s in all", f"s to {NEAR:.0%} of Full-FT", "epochs to where BitFit ends"]]
    for model in _models(cells):
        for task, methods in _by_method(cells, model).items():
            full, uniform = (curves[id(methods[name])] if name in methods else None for name in ("full", "bitfit"))
            for name, cell in methods.items():
                one = curves[id(cell)]
                if one is None:
                    continue
                near = None if full is None else one.seconds_to(NEAR * max(full.scores))
                told = "–" if near is None else f"{'≤ ' if near[1] else ''}{near[0]:.0f}"
                epoch = None if uniform is None else one.first_epoch(uniform.scores[-1])
                rows.append(
                    [
                        model,
                        task,
                        paper.method_name(name),
                        f"{one.seconds[-1]:.0f}",
                        told,
                        "–" if epoch is None else f"{epoch:g}",
                    ]
                )
    if len(rows) == 1:
        return ["No run yet."]
    note = (
        "Processor time of training in seconds, evaluations left out, on the hardware below. Between two evaluations "
        "a score is taken to rise in a straight line; ≤: it was reached by the first. –: it was not reached."
    )
    if any("MRPC" in cell.task.columns for cell in cells):
        note += " MRPC says little of times: to answer yes to everything gives an F1 of 81."
    return [table(rows, 3), "", note]


def _picture(cells: Sequence[Cell], context: Context) -> Figure | None:
    """A panel for each task: score by processor time, a point for each epoch."""
    panels = [
        (model, task, found)
        for model in _models(cells)
        for task, methods in _by_method(cells, model).items()
        if (found := {name: one for name, cell in methods.items() if (one := curve(cell, context)) is not None})
    ]
    if not panels:
        return None
    across = 2 if len(panels) == 4 else 3
    picture, axes = new_axes(len(panels), across=across)
    for axis, (model, task, found) in zip(axes, panels):
        for name, one in found.items():
            scores = np.multiply(100, one.scores)
            axis.plot(one.seconds, scores, marker="o", color=COLORS.get(name), label=paper.method_name(name))
        if "full" in found:
            axis.axhline(100 * NEAR * max(found["full"].scores), linestyle=":", color="0.5", linewidth=1)
        axis.set_title(f"{model}, {task}", fontsize=10)
        axis.set_xlim(left=0)
    for axis in axes[-across:]:
        axis.set_xlabel("seconds of training, one core")
    for axis in axes[::across]:
        axis.set_ylabel("score")
    shared_legend(picture, axes)
    return picture
