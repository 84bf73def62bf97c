"""Does what is missing of a plan: one run after the other, each at most once over all processes that share the folder.

A run is a call of its recipe's `main(argv)`, in this process, so under `accelerate launch` all processes train one run
together: the first one decides which, claims it and stores it; the others follow.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitfit_hf.analysis import BiasChange, bias_change
from bitfit_hf.storage.files import CONFIG_FILE

from .aggregate import missing_runs
from .cost import CostModel
from .plan import Cell, Run, Selection
from .store import RunStore

logger = logging.getLogger(__name__)

ORDERS = ("useful", "cheapest")


@dataclass
class Outcome:
    """What came out of a run: the recipe's record, and how far the biases have moved."""

    record: dict[str, Any]
    bias_change: BiasChange = field(default_factory=BiasChange)


Execute = Callable[[Run, Path], "Outcome | None"]


@dataclass(frozen=True)
class Places:
    """
    What differs from machine to machine, and is never stored.

    Args:
        data_dir (`str`, *optional*): Folder of local data; the Hub without.
        models (`Mapping[str, str]`): Folder by the name of a model; the Hub for the others.
    """

    data_dir: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)


def command_line(run: Run, places: Places, output_dir: Path | str) -> list[str]:
    """The recipe's arguments for a run.

    Args:
        run ([`Run`]): What is to be done.
        places ([`Places`]): Where models and data are.
        output_dir (`Path` or `str`): Gets the record and what the method saves.
    """
    values = run.arguments()
    values["model_name_or_path"] = places.models.get(run.model.name, run.model.model_name_or_path)
    values["output_dir"] = str(output_dir)
    if places.data_dir is not None:
        values["data_dir"] = places.data_dir
    arguments: list[str] = []
    for name, value in values.items():
        if value is not None:
            listed = value if isinstance(value, (list, tuple)) else [value]
            arguments += [f"--{name}", *(str(one) for one in listed)]
    return arguments


class RecipeRunner:
    """
    Executes runs by their recipes.

    Args:
        places ([`Places`]): Where models and data are.
        keep_outputs (`str` or `Path`, *optional*): Folder in which what the recipes write is kept, such as the
            prediction files for the GLUE server, and `log.txt` with what they print; deleted without.
    """

    def __init__(self, places: Places, keep_outputs: str | Path | None = None) -> None:
        self.places = places
        self.keep_outputs = None if keep_outputs is None else Path(keep_outputs)

    def __call__(self, run: Run, folder: Path) -> Outcome | None:
        """Does one run; returns what came out, in the first process only."""
        output = folder if self.keep_outputs is None else self.keep_outputs / run.id
        arguments = command_line(run, self.places, output)
        logger.info("python recipes/%s.py %s", run.task.recipe, shlex.join(arguments))
        output.mkdir(parents=True, exist_ok=True)
        name = "log.txt" if process_index() == 0 else os.devnull
        with open(output / name, "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            importlib.import_module(run.task.recipe).main(arguments)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if process_index() != 0:
            return None
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        return Outcome(record, _changes(output) if run.method.name.startswith("bitfit") else BiasChange())


def _changes(output: Path) -> BiasChange:
    """Figure 1's rows of the delta that a run has saved."""
    deltas = sorted(path.parent for path in output.rglob(CONFIG_FILE) if "checkpoint" not in str(path.parent.name))
    if len(deltas) != 1:
        raise FileNotFoundError(f"A BitFit run saves one delta; found {len(deltas)} in {output}.")
    return bias_change(deltas[0])


def process_index() -> int:
    """Rank of this process among those that train one run together."""
    return int(os.environ.get("RANK", "0"))


def agree(value: Any) -> Any:
    """What the first process says; every process must call it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # Joins the process group that the Trainers will use, on the device that the recipes choose.
    PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()))
    return broadcast_object_list([value])[0]


@dataclass
class Sweep:
    """
    What a call of [`run_missing`] did.

    Args:
        done (`list[str]`): Ids of the runs.
        failed (`dict[str, str]`): By id, the error.
        elsewhere (`int`): Runs that other processes were doing at the end.
        stopped (`str`, *optional*): Why there are still runs that could have been done.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: int = 0
    stopped: str | None = None


def pending(cells: Iterable[Cell], store: RunStore, which: str, selection: Selection) -> list[tuple[Cell, Run]]:
    """The missing runs that can be done now, with their cells."""
    return [
        (cell, run)
        for cell in cells
        if selection.cell(cell)
        for run in missing_runs(cell, store, which)[0]
        if selection.run(run)
    ]


def in_order(runs: list[tuple[Cell, Run]], order: str, costs: CostModel) -> list[Run]:
    """Runs in the order in which they are done.

    Args:
        runs (`list[tuple[Cell, Run]]`): As [`pending`] gives them.
        order (`str`):
            `"useful"`: by the study's parts, in each first every cell once, then the grids, then further seeds.
            `"cheapest"`: by estimated time; those of unknown cost last.
        costs ([`CostModel`]): Of `"cheapest"`.
    """

    def key(entry: tuple[Cell, Run]) -> tuple[float, ...]:
        cell, run = entry
        if order == "useful":
            return cell.urgency(run)
        seconds = costs.estimate(run).seconds
        return (math.inf if seconds is None else seconds, *cell.urgency(run))

    return [run for _, run in sorted(runs, key=key)]


def run_missing(
    cells: list[Cell],
    store: RunStore,
    execute: Execute,
    costs: CostModel,
    *,
    which: str = "best",
    selection: Selection | None = None,
    order: str = "useful",
    time_limit: float | None = None,
    keep_going: bool = False,
    tell: Callable[[str], None] = logger.info,
) -> Sweep:
    """Does what is missing, until nothing is left or the time is up.

    Args:
        cells (`list[Cell]`): The plan.
        store ([`RunStore`]): What is there already; gets what is done.
        execute (`Callable`): Does one run, see [`RecipeRunner`].
        costs ([`CostModel`]): Estimates; learns from each run.
        which (`str`, *optional*, defaults to `"best"`): Which score chooses the learning rate.
        selection ([`Selection`], *optional*): Which of the runs.
        order (`str`, *optional*, defaults to `"useful"`): Or `"cheapest"`.
        time_limit (`float`, *optional*): In seconds: no run is started that would not end within it by its estimate.
        keep_going (`bool`, *optional*, defaults to `False`): Go on after a run that failed. Not for several processes
            that train one run together: the others would wait for ever.
        tell (`Callable`, *optional*): Gets one line per run.

    Returns:
        [`Sweep`]: What was done.
    """
    selection = selection or Selection()
    sweep = Sweep()
    start = time.monotonic()
    skipped: set[str] = set()  # other processes have them, or they failed
    while True:
        with _next_run(
            cells, store, costs, which, selection, order, _left(time_limit, start), skipped, sweep
        ) as found:
            run, folder = agree(found)
            if run is None:
                break
            tell(f"{run.id}: {_progress(run, costs)}")
            began = time.monotonic()
            try:
                outcome = execute(run, folder)
            except Exception as error:
                if not keep_going:
                    raise
                logger.exception("%s failed", run.id)
                sweep.failed[run.id] = f"{type(error).__name__}: {error}"
                skipped.add(run.id)
                continue
            seconds = time.monotonic() - began
            if outcome is not None:
                store.put(run, outcome.record, seconds, outcome.bias_change)
            costs.learn(run, seconds)
            sweep.done.append(run.id)
    return sweep


@contextlib.contextmanager
def _next_run(
    cells: list[Cell],
    store: RunStore,
    costs: CostModel,
    which: str,
    selection: Selection,
    order: str,
    left: float,
    skipped: set[str],
    sweep: Sweep,
) -> Iterator[tuple[Run | None, Path | None]]:
    """Claims the next run for as long as the context lasts; `(None, None)` when there is none. First process only."""
    if process_index() != 0:
        yield None, None
        return
    for run in in_order(pending(cells, store, which, selection), order, costs):
        if run.id in skipped:
            continue
        seconds = costs.estimate(run).seconds
        if left <= 0 or (seconds is not None and seconds > left):
            sweep.stopped = "the time limit: no further run would fit"
            continue  # a cheaper one may
        with store.claim(run) as folder:
            if folder is None:
                continue
            sweep.stopped = None
            yield run, folder
            return
    sweep.elsewhere = sum(
        store.is_claimed(run) for _, run in pending(cells, store, which, selection) if run.id not in skipped
    )
    yield None, None


def _left(time_limit: float | None, start: float) -> float:
    return math.inf if time_limit is None else time_limit - (time.monotonic() - start)


def _progress(run: Run, costs: CostModel) -> str:
    seconds = costs.estimate(run).seconds
    return "time unknown" if seconds is None else f"about {seconds / 60:.1f} min"
