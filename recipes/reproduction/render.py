"""Tables 1 to 3 and the POS study as Markdown: our figures, and the paper's beside them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from . import paper
from .aggregate import Summary, at_edge, best_run, summarize
from .markdown import Context, document, figure, paper_figure, percent, table
from .plan import Cell

TITLES = {
    "table1": "Table 1: BitFit against full fine-tuning, Diff-Pruning and Adapters",
    "table2": "Table 2: BitFit against full fine-tuning, by model",
    "table3": "Table 3: subsets of the bias terms, and random parameters",
    "pos": "POS tagging: BitFit against full fine-tuning",
}


def render_table(study: str, cells: Sequence[Cell], context: Context) -> str:
    """One of the tables, as it is with the runs that are there.

    Args:
        study (`str`): A key of `TITLES`.
        cells (`Sequence[Cell]`): Its cells.
        context ([`Context`]): Runs and configuration.

    Returns:
        `str`: Markdown.
    """
    body = [scores_table(study, cells, context), ""]
    if study == "table1":
        body += _paper_test_set()
    if study == "pos":
        body += _paper_pos()
    body += ["## Learning rates, sizes and times", "", details_table(cells, context), ""]
    if at_edges := edges(cells, context):
        body += [at_edges, ""]
    return document(TITLES[study], context, study, cells, body)


def _columns(cells: Sequence[Cell]) -> list[tuple[str, str, str, bool]]:
    """`(heading, task, metric, whether the paper has it)`, in the order of the paper where all are in it."""
    found = {}
    for cell in cells:
        for heading, metric in cell.task.columns.items():
            found.setdefault((cell.task.name, heading), (heading, cell.task.name, metric, cell.task.paper))
    headings = [heading for _, heading in found]
    columns = list(found.values())
    if len(set(headings)) == len(headings) and all(heading in paper.COLUMNS for heading in headings):
        columns.sort(key=lambda column: paper.COLUMNS.index(column[0]))
    return columns


def _heading(column: tuple[str, str, str, bool], columns: Sequence[tuple[str, str, str, bool]]) -> str:
    """The column's name, with the task where several tasks share it (SST-2 of 2,000 and of 10,000 rows)."""
    heading, task, _, _ = column
    return f"{heading} ({task})" if [other[0] for other in columns].count(heading) > 1 else heading


def scores_table(study: str, cells: Sequence[Cell], context: Context) -> str:
    columns = _columns(cells)
    by_place = {(cell.model.name, cell.method.name, cell.task.name): cell for cell in cells}
    averaged = len({heading for heading, *_ in columns}) == len(columns) > 1  # no task twice
    rows = [["model", "method", "trained", *(_heading(column, columns) for column in columns), *["avg"][:averaged]]]
    pairs = dict.fromkeys((cell.model.name, cell.method.name) for cell in cells)
    for model, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        for _, method in group:
            own = [cell for cell in cells if (cell.model.name, cell.method.name) == (model, method)]
            summaries: list[Summary | None] = []
            for _, task, metric, _ in columns:
                cell = by_place.get((model, method, task))
                summaries.append(None if cell is None else summarize(cell, context.store, metric, context.score))
            means = [summary.mean for summary in summaries if summary is not None and summary.values]
            average = percent(float(np.mean(means))) if averaged and len(means) == len(columns) else ""
            figures = ["" if summary is None else figure(summary) for summary in summaries]
            rows.append([model, paper.method_name(method), _share(own, context), *figures, *[average][:averaged]])
            theirs = _paper_row(study, own[0].model.paper, method, columns)
            if theirs is not None:
                rows.append(theirs if averaged else theirs[:-1])
    return table(rows, left=2)


def _paper_row(
    study: str, model: str | None, method: str, columns: Sequence[tuple[str, str, str, bool]]
) -> list[str] | None:
    """The paper's row for one of ours, in italics; `None` where it has none. Its average is over the same columns."""
    if model is None or study == "pos":
        return None
    found = [paper.glue(model, method, heading) if same else None for heading, _, _, same in columns]
    if not any(found):
        return None
    share = paper.percent_trained(model, method)
    trained = "" if share is None else f"{share.value:g} %" + (paper.MARK if share.source == paper.RECALLED else "")
    values = [value.value for value in found if value is not None]
    average = (
        paper_figure(paper.PaperFigure(float(np.mean(values)), paper.RECALLED))
        if len(values) == len(columns) > 1
        else ""
    )
    names = [f"paper, {model}", paper.method_name(method)]
    return [f"*{word}*" if word else "" for word in [*names, trained, *map(paper_figure, found), average]]


def _share(cells: Sequence[Cell], context: Context) -> str:
    """Trained parameters of the body, and their share of the base: what the paper's percentages count."""
    for cell in cells:
        stored = best_run(cell, context.store, context.score)
        if stored is not None:
            counts = stored.record["trainable"]
            share = 100 * counts["body"] / counts["base"]
            return f"{counts['body']:,} ({share:.0f} %)" if share >= 10 else f"{counts['body']:,} ({share:.2g} %)"
    return ""


def details_table(cells: Sequence[Cell], context: Context) -> str:
    rows = [["model", "task", "method", "rate", "of the grid", "n", "body", "head", "kB on disk", "s per run"]]
    for cell in cells:
        summary = summarize(cell, context.store, which=context.score)
        stored = best_run(cell, context.store, context.score)
        grid = ", ".join(f"{rate:g}" for rate in cell.learning_rates)
        place = [cell.model.name, cell.task.name, paper.method_name(cell.method.name)]
        if stored is None or summary.choice is None:
            rows.append([*place, "–", grid, "0", "", "", "", ""])
            continue
        counts = stored.record["trainable"]
        tried = grid if summary.choice.complete else f"{grid} ({summary.choice.tried} tried)"
        rows.append(
            [
                *place,
                f"{summary.choice.learning_rate:g}",
                tried,
                str(len(summary.values)),
                f"{counts['body']:,}",
                f"{counts['head']:,}",
                f"{stored.record['bytes'] / 1000:,.0f}",
                f"{stored.wall_seconds:.0f}",
            ]
        )
    return table(rows, left=3)


def edges(cells: Sequence[Cell], context: Context) -> str:
    """Says where a wider grid might have done better: a grid that is too narrow is no fair chance."""
    found = []
    for cell in cells:
        edge = at_edge(summarize(cell, context.store, which=context.score))
        if edge is not None:
            found.append(f"{cell.model.name} {cell.task.name} {paper.method_name(cell.method.name)} ({edge})")
    if not found:
        return ""
    return f"The chosen rate is at the edge of its grid, so a wider one might do better: {'; '.join(found)}."


def _paper_test_set() -> list[str]:
    model = "BERT-large"
    rows = [["method", *paper.COLUMNS, "avg"]]
    for method in ("full", "adapter", "diff_pruning", "bitfit"):
        values = [paper_figure(paper.glue(model, method, column, "test")) for column in (*paper.COLUMNS, "avg")]
        rows.append([f"*{paper.method_name(method)}*", *values])
    return [
        "## The paper's test set figures (BERT-large)",
        "",
        "Labels of the test sets are with the GLUE server only; the figures above are of the dev sets. "
        "`--keep_outputs DIR` keeps each run's prediction files, in the server's format.",
        "",
        table(rows),
        "",
    ]


def _paper_pos() -> list[str]:
    rows = [["model", "Full-FT", "BitFit"]] + [
        [model, *(paper_figure(paper.pos(model, method)) for method in ("full", "bitfit"))]
        for model in ("BERT-base", "BERT-large", "RoBERTa-base")
    ]
    return ["## The paper's figures (accuracy on the Penn Treebank)", "", paper.POS, "", table(rows), ""]
