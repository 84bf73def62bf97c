"""What the paper claims, tested against our own runs and reported as it is.

A claim compares two methods on every task that has runs of both. Differences are judged against the noise between
seeds: twice the standard error of the difference of two means. Where a side has a single seed the noise is not known,
and the line says so. The thresholds of the words "on par", "slightly" and "far" are ours, and stand beside the words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import paper
from .aggregate import Summary, best_run, summarize
from .figures import gaps
from .markdown import Context, document, figure, table
from .plan import Cell

YES, NO = "agrees", "disagrees"
NO_DATA = "not enough data"


@dataclass(frozen=True)
class Claim:
    """
    A comparison of two methods' scores.

    Args:
        text (`str`): The paper's claim, with our reading of it.
        first (`str`), second (`str`): The methods.
        low (`float`), high (`float`): The difference, first minus second in points, is claimed to lie between these.
    """

    text: str
    first: str
    second: str
    low: float = -math.inf
    high: float = math.inf


CLAIMS = (
    Claim("BitFit is on par with Full-FT or better (at most 1 point below)", "bitfit", "full", low=-1.0),
    Claim(
        "b_q and b_m2 alone are slightly below BitFit (below, by at most 4 points)",
        "bitfit:query+intermediate",
        "bitfit",
        low=-4.0,
        high=0.0,
    ),
    Claim("b_m2 alone is below BitFit", "bitfit:intermediate", "bitfit", high=0.0),
    Claim("b_q alone is below BitFit", "bitfit:query", "bitfit", high=0.0),
    Claim("as many random parameters (rand uniform) are below BitFit", "rand_uniform", "bitfit", high=0.0),
    Claim("random rows and columns (rand row/col) are below BitFit", "rand_row_col", "bitfit", high=0.0),
    Claim("a frozen body is far below BitFit (by at least 5 points)", "frozen", "bitfit", high=-5.0),
    Claim("BitFit is on par with Diff-Pruning or better (at most 1 point below)", "bitfit", "diff_pruning", low=-1.0),
    Claim("BitFit is on par with Adapters or better (at most 1 point below)", "bitfit", "adapter", low=-1.0),
)


def verdict(difference: float, error: float | None, low: float, high: float) -> str:
    """Whether a difference agrees with a claim, and how sure that is.

    Args:
        difference (`float`): In points.
        error (`float`, *optional*): Standard error of the difference, in points; `None` where it is not known.
        low (`float`), high (`float`): Where it is claimed to lie.
    """
    if math.isnan(difference):
        return NO_DATA
    answer = YES if low <= difference <= high else NO
    if error is None:
        return f"{answer} (one seed: noise unknown)"
    distance = min(abs(difference - edge) for edge in (low, high) if math.isfinite(edge))
    return answer if distance > 2 * error else f"{answer} (within noise)"


def standard_error(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Of the difference of two means over seeds; `None` if a side has a single one."""
    parts = []
    for values in (first, second):
        if len(values) < 2:
            return None
        mean = sum(values) / len(values)
        parts.append(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return math.sqrt(sum(parts))


def _compare(
    cells: Sequence[Cell],
    first: str,
    second: str,
    values: Callable[[Cell], Sequence[float]],
    low: float,
    high: float,
) -> list[tuple[Cell, Cell, float, str]]:
    """The tasks with data of both methods: cells, difference in points, verdict."""
    by_place = {(cell.model.name, cell.task.name, cell.method.name): cell for cell in cells}
    found = []
    for (model, task, method), cell in by_place.items():
        other = by_place.get((model, task, second))
        if method != first or other is None:
            continue
        ours, theirs = values(cell), values(other)
        if not ours or not theirs:
            continue
        difference = 100 * (sum(ours) / len(ours) - sum(theirs) / len(theirs))
        error = standard_error(ours, theirs)
        found.append((cell, other, difference, verdict(difference, None if error is None else 100 * error, low, high)))
    return found


def _count(verdicts: Sequence[str]) -> str:
    """One line over the tasks."""
    if not verdicts:
        return f"**{NO_DATA}**"
    agreeing = sum(one.startswith(YES) for one in verdicts)
    unsure = sum("noise" in one for one in verdicts)
    judged = sum(one != NO_DATA for one in verdicts)
    if not judged:
        return f"**{NO_DATA}**"
    line = f"**{agreeing} of {judged} {'task agrees' if judged == 1 else 'tasks agree'}**"
    return line + (f", {unsure} of the answers within noise or from a single seed" if unsure else "")


def _scores(claim: Claim, cells: Sequence[Cell], context: Context) -> tuple[str, list[str]]:
    def summary(cell: Cell) -> Summary:
        return summarize(cell, context.store, which=context.score)

    compared = _compare(cells, claim.first, claim.second, lambda c: summary(c).values, claim.low, claim.high)
    names = [paper.method_name(claim.first), paper.method_name(claim.second)]
    lines = [["model", "task", *names, "difference", "verdict"]]
    for first, second, difference, answer in compared:
        figures = [figure(summary(cell)) for cell in (first, second)]
        lines.append([first.model.name, first.task.name, *figures, f"{difference:+.1f}", answer])
    return _count([answer for *_, answer in compared]), [table(lines, 2), ""] if compared else []


def _key_biases(cells: Sequence[Cell], context: Context) -> tuple[str, list[str]]:
    """How far the key biases moved, beside the query biases of the same run."""
    lines = [["model", "task", "n", "b_k relative to b_q", "b_k relative to the most moved term", "verdict"]]
    verdicts = []
    for cell in cells:
        stored = best_run(cell, context.store, context.score)
        if cell.method.name != "bitfit" or stored is None or not stored.bias_change:
            continue
        averages = {term: value for (_, term), value in stored.changes().averages().items()}
        if not averages.get("query"):
            continue
        ratio = averages.get("key", math.nan) / averages["query"]
        answer = YES if ratio <= 0.01 else NO
        verdicts.append(answer)
        largest = averages.get("key", math.nan) / max(averages.values())
        lines.append([cell.model.name, cell.task.name, "1", f"{ratio:.2%}", f"{largest:.2%}", answer])
    if not verdicts:
        return _count(verdicts), []
    note = (
        "The gradient of b_k is zero but for rounding: a softmax does not see what is added to all its inputs. Adam "
        "divides by the gradient's size, so it makes steps out of rounding noise, of half-precision autocast most of "
        "all. Such steps change b_k and not what the model computes."
    )
    return _count(verdicts), [table(lines, 2), "", note, ""]


def _gaps(cells: Sequence[Cell], context: Context) -> tuple[str, list[str]]:
    def values(cell: Cell) -> list[float]:
        return [one.final for one in gaps(cell, context)]

    lines = [["model", "task", "gap of BitFit", "gap of Full-FT", "difference", "n", "verdict"]]
    compared = _compare(cells, "bitfit", "full", values, -math.inf, 0.0)
    for first, second, difference, answer in compared:
        ours, theirs = values(first), values(second)
        means = [f"{100 * sum(found) / len(found):.1f}" for found in (ours, theirs)]
        counts = f"{len(ours)}, {len(theirs)}"
        lines.append([first.model.name, first.task.name, *means, f"{difference:+.1f}", counts, answer])
    return _count([answer for *_, answer in compared]), [table(lines, 2), ""] if compared else []


def _small_data(cells: Sequence[Cell], context: Context) -> tuple[str, list[str]]:
    """On the smallest training set BitFit is ahead, on the largest Full-FT."""

    def values(cell: Cell) -> Sequence[float]:
        return summarize(cell, context.store, which=context.score).values

    squad = sorted((cell for cell in cells if cell.task.recipe == "squad"), key=lambda cell: cell.task.train_rows or 0)
    sizes = sorted({cell.task.train_rows or 0 for cell in squad if values(cell)})
    lines = [["model", "questions", "BitFit − Full-FT, exact match", "claimed", "verdict"]]
    verdicts = []
    for size, low, high in ((sizes[0], 0.0, math.inf), (sizes[-1], -math.inf, 0.0)) if len(sizes) > 1 else ():
        chosen = [cell for cell in squad if (cell.task.train_rows or 0) == size]
        for first, _, difference, answer in _compare(chosen, "bitfit", "full", values, low, high):
            verdicts.append(answer)
            words = "BitFit ahead" if low == 0 else "Full-FT ahead"
            lines.append([first.model.name, f"{size:,}", f"{difference:+.1f}", words, answer])
    return _count(verdicts), [table(lines, 1), ""] if verdicts else []


def render_claims(cells: Sequence[Cell], context: Context) -> str:
    """All claims with their evidence, as Markdown.

    Args:
        cells (`Sequence[Cell]`): Of all studies of the config.
        context ([`Context`]): Runs and configuration.
    """
    sections = [(claim.text, *_scores(claim, cells, context)) for claim in CLAIMS]
    sections += [
        ("Key biases are all but unmoved (at most 1 % of the query biases' change)", *_key_biases(cells, context)),
        ("The generalization gap of BitFit is smaller than that of Full-FT", *_gaps(cells, context)),
        (
            "With little data BitFit is ahead, with much Full-FT (SQuAD exact match, smallest and largest subset)",
            *_small_data(cells, context),
        ),
    ]
    body = [
        "Each of the paper's claims against our own runs, task by task. A difference is judged against the noise "
        "between seeds, twice the standard error of the difference; with one seed on a side the noise is not known.",
        "",
        table([["claim", "our runs"], *([text, line] for text, line, _ in sections)], 2),
        "",
    ]
    for text, line, evidence in sections:
        body += [f"## {text}", "", f"{line}.", "", *evidence]
    return document("What the paper claims, and what our runs say", context, None, cells, body)
