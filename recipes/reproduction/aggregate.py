"""From runs to the figures of a table: the learning rate is chosen on the dev set, then seeds are averaged.

A task with `dev_halves: true` has a dev set in two halves: on one the learning rate (and, with `score: best`, the
epoch) is chosen, of the other are the figures. Without it they are of the rows that were chosen on, as in the paper:
figures chosen so are optimistic, for every method alike. Every output says which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .plan import Cell, Run
from .store import RunStore, StoredRun
from .studies import Task


def score(stored: StoredRun, metric: str, which: str = "best") -> float:
    """A run's metric on the dev set; NaN where a run that diverged has none.

    Args:
        stored ([`StoredRun`]): A finished run.
        metric (`str`): Its name in the record, such as `"accuracy"`.
        which (`str`, *optional*, defaults to `"best"`): Of the best epoch, or `"final"`.

    Raises:
        `KeyError`: The record has no such metric.
    """
    metrics = stored.record["metrics"][which]
    if metric not in metrics:
        raise KeyError(f"Run {stored.id} has no metric {metric!r}; it has {', '.join(metrics)}.")
    value = metrics[metric]
    return math.nan if value is None else float(value)


def reported(task: Task, metric: str) -> str:
    """The name in a record of what a table shows: of the half of the dev set that nothing was chosen on, if any."""
    return f"report_{metric}" if task.dev_halves else metric


@dataclass(frozen=True)
class Choice:
    """
    A learning rate and what it was chosen from.

    Args:
        learning_rate (`float`): The one with the highest mean dev score.
        seeds (`tuple[int, ...]`): Those that the rates were compared with.
        tried (`int`), of (`int`): How many rates of the grid had been run.
    """

    learning_rate: float
    seeds: tuple[int, ...]
    tried: int
    of: int

    @property
    def complete(self) -> bool:
        """Whether every rate of the grid was tried."""
        return self.tried == self.of


def choose(cell: Cell, store: RunStore, which: str = "best") -> Choice | None:
    """The learning rate with the best mean dev score.

    The rates are compared on the seeds that every rate tried so far has; on the first seed alone where the others run
    only at the rate that it chose. A run that diverged counts as the worst; between equals the smaller rate wins.

    Args:
        cell ([`Cell`]): What is chosen for.
        store ([`RunStore`]): Its runs.
        which (`str`, *optional*, defaults to `"best"`): Which score.

    Returns:
        [`Choice`], *optional*: `None` while there is no run with the first seed.
    """
    scores: dict[float, dict[int, float]] = {}
    for run in cell.possible():
        stored = store.get(run)
        if stored is not None:
            value = score(stored, cell.task.metric, which)
            scores.setdefault(run.learning_rate, {})[run.seed] = -math.inf if math.isnan(value) else value
    tried = {rate: found for rate, found in scores.items() if cell.first_seed in found}
    if not tried:
        return None
    seeds = [cell.first_seed] if cell.seeds_at_best else list(cell.seeds)
    shared = [seed for seed in seeds if all(seed in found for found in tried.values())]
    means = {rate: float(np.mean([found[seed] for seed in shared])) for rate, found in sorted(tried.items())}
    return Choice(max(means, key=means.__getitem__), tuple(shared), len(tried), len(cell.learning_rates))


def settled(cell: Cell, store: RunStore, which: str = "best") -> float | None:
    """The chosen learning rate once the whole grid has been tried; `None` before."""
    choice = choose(cell, store, which)
    return choice.learning_rate if choice is not None and choice.complete else None


@dataclass(frozen=True)
class Summary:
    """
    One figure of a table.

    Args:
        cell ([`Cell`]): What it is about.
        metric (`str`): Of which metric.
        values (`tuple[float, ...]`): By seed, at the chosen learning rate, as the metric gives them (0 to 1); of the
            half of the dev set that is reported, where there are halves.
        choice ([`Choice`], *optional*): `None` where there is no run.
        done (`int`), wanted (`int`): How many runs of how many the cell has.
    """

    cell: Cell
    metric: str
    values: tuple[float, ...]
    choice: Choice | None
    done: int
    wanted: int

    @property
    def mean(self) -> float:
        """Over the seeds; NaN where there is no run."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds (n − 1 in the denominator); `None` of a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def complete(self) -> bool:
        """Whether nothing of the cell is missing."""
        return self.done == self.wanted


def runs_at(cell: Cell, store: RunStore, learning_rate: float) -> list[StoredRun]:
    """The finished runs of a cell at one learning rate, by seed."""
    found = [store.get(cell.run(learning_rate, seed)) for seed in cell.seeds]
    return [stored for stored in found if stored is not None]


def values_at(
    cell: Cell, store: RunStore, learning_rate: float, metric: str | None = None, which: str = "best"
) -> tuple[float, ...]:
    """What a table shows of a cell at one learning rate, by seed, from 0 to 1; see [`summarize`]."""
    unit = 0.01 if cell.task.in_percent else 1.0
    name = reported(cell.task, metric or cell.task.metric)
    return tuple(unit * score(stored, name, which) for stored in runs_at(cell, store, learning_rate))


def summarize(cell: Cell, store: RunStore, metric: str | None = None, which: str = "best") -> Summary:
    """The figure of one cell: mean and deviation over the seeds at the chosen learning rate.

    Args:
        cell ([`Cell`]): What it is about.
        store ([`RunStore`]): Its runs.
        metric (`str`, *optional*): What to report; the learning rate is chosen by the task's own in any case.
        which (`str`, *optional*, defaults to `"best"`): Which score.
    """
    metric = metric or cell.task.metric
    choice = choose(cell, store, which)
    values = () if choice is None else values_at(cell, store, choice.learning_rate, metric, which)
    missing, waiting = missing_runs(cell, store, which)
    return Summary(cell, metric, values, choice, cell.size - len(missing) - waiting, cell.size)


def missing_runs(cell: Cell, store: RunStore, which: str = "best") -> tuple[list[Run], int]:
    """The runs of a cell that can be done now, and how many more there will be once the learning rate is chosen."""
    chosen = settled(cell, store, which)
    return [run for run in cell.wanted(chosen) if store.get(run) is None], cell.waiting(chosen)


def best_run(cell: Cell, store: RunStore, which: str = "best") -> StoredRun | None:
    """The run with the first seed at the chosen learning rate: the one that single-run pictures show."""
    choice = choose(cell, store, which)
    return None if choice is None else store.get(cell.run(choice.learning_rate, cell.first_seed))


def at_edge(summary: Summary) -> str | None:
    """`"lowest"` or `"highest"` where the chosen rate is at the edge of its grid: a wider one might do better."""
    rates: Sequence[float] = summary.cell.learning_rates
    if summary.choice is None or not summary.choice.complete or len(rates) < 2:
        return None
    if summary.choice.learning_rate == rates[0]:
        return "lowest"
    return "highest" if summary.choice.learning_rate == rates[-1] else None
