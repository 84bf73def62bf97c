"""What is left to do, in runs, trained tokens and hours; the hours are estimated from the runs that are there."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .aggregate import missing_runs
from .plan import Cell, Run, Selection
from .store import RunStore
from .studies import StudyConfig

ASSUMED = "assumed"


@dataclass(frozen=True)
class Estimate:
    """
    How long a run will take.

    Args:
        seconds (`float`, *optional*): Wall time; `None` where nothing is known.
        source (`str`): What it was estimated from.
    """

    seconds: float | None
    source: str


class CostModel:
    """
    Estimates runs from finished ones: the median of the same model, task and method; else that of the same model and
    method, or of the same model, by trained token; else the speed that the study config assumes.

    Args:
        config ([`StudyConfig`]): Its `ms_per_token` is what is assumed.
        store ([`RunStore`]): The finished runs.
        cells (`Iterable[Cell]`): Where to look for finished runs.
    """

    def __init__(self, config: StudyConfig, store: RunStore, cells: Iterable[Cell]) -> None:
        self.assumed = config.ms_per_token
        self.seconds: dict[tuple[str, ...], list[float]] = {}
        self.per_token: dict[tuple[str, ...], list[float]] = {}
        for cell in cells:
            for run in cell.possible():
                stored = store.get(run)
                if stored is not None:
                    self.learn(run, stored.wall_seconds)

    def learn(self, run: Run, seconds: float) -> None:
        """Takes in a finished run."""
        model, method = run.model.name, run.method.name
        self.seconds.setdefault((model, run.task.name, method), []).append(seconds)
        if run.task.trained_tokens:
            for key in ((model, method), (model,)):
                self.per_token.setdefault(key, []).append(seconds / run.task.trained_tokens)

    def estimate(self, run: Run) -> Estimate:
        """How long a run will take, and how that is known."""
        model, method = run.model.name, run.method.name
        if known := self.seconds.get((model, run.task.name, method)):
            return Estimate(statistics.median(known), "runs of the same task and method")
        tokens = run.task.trained_tokens
        if tokens is None:
            return Estimate(None, "unknown: the study config gives no rows, tokens or epochs")
        for key, source in (((model, method), "runs of the same method"), ((model,), "runs of the same model")):
            if known := self.per_token.get(key):
                return Estimate(statistics.median(known) * tokens, source)
        speed = self.assumed.get(method, self.assumed.get("default"))
        return Estimate(None, "unknown") if speed is None else Estimate(speed * tokens / 1000, ASSUMED)


@dataclass(frozen=True)
class Bill:
    """
    What is missing.

    Args:
        runs (`list[Run]`): Those that can be done now.
        waiting (`int`): How many more there will be once learning rates are chosen.
        wanted (`int`), done (`int`): Runs of the whole plan.
        tokens (`float`): Trained tokens of the missing runs, the waiting ones included.
        seconds (`float`): Their estimated time.
        unknown (`int`): Runs that no time is known of, not in `seconds`.
        assumed (`int`): Runs whose time rests on the assumed speed, and not on finished runs.
    """

    runs: list[Run]
    waiting: int
    wanted: int
    done: int
    tokens: float
    seconds: float
    unknown: int
    assumed: int

    @property
    def hours(self) -> float:
        """Estimated, on one machine as that of the finished runs, one run after the other."""
        return self.seconds / 3600

    @property
    def missing(self) -> int:
        """All missing runs."""
        return len(self.runs) + self.waiting


def bill(cells: Iterable[Cell], store: RunStore, model: CostModel, which: str, selection: Selection) -> Bill:
    """Adds up what is missing of the selected cells.

    A run that waits for its learning rate costs what its cell's other runs cost. With a selection of seeds or learning
    rates the waiting runs of the other seeds are left out where that is known.
    """
    runs: list[Run] = []
    waiting = wanted = done = unknown = assumed = 0
    tokens = seconds = 0.0
    for cell in cells:
        if not selection.cell(cell):
            continue
        now, later = missing_runs(cell, store, which)
        done += cell.size - len(now) - later
        wanted += cell.size
        now = [run for run in now if selection.run(run)]
        if selection.seeds is not None and later:
            later = len([seed for seed in list(cell.seeds)[1:] if seed in selection.seeds])
        runs += now
        waiting += later
        estimate = model.estimate(cell.grid()[0])
        count = len(now) + later
        tokens += count * (cell.task.trained_tokens or 0.0)
        if estimate.seconds is None:
            unknown += count
        else:
            seconds += count * estimate.seconds
            assumed += count if estimate.source == ASSUMED else 0
    return Bill(runs, waiting, wanted, done, tokens, seconds, unknown, assumed)
