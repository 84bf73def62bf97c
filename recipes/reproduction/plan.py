"""From a study to its runs: every run has an id that is the same on every machine, and says what is missing.

A table's cell is one model on one task by one method. Its runs are a grid of learning rates with the first seed, then
further seeds: at every rate, or with `seeds_at_best` only at the rate that the first seed chose, which is known only
when the grid is complete. So a plan cannot be a fixed list: [`Cell.missing`] says what can be run now, and
[`Cell.waiting`] how many runs are to come once the rate is chosen.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from .studies import Method, Model, StudyConfig, Task

# What all runs have in common without any study saying so. It is part of a run's identity: a result of other rules is
# never taken for one of these.
#   1  An untrained pooler was frozen, for all methods.
#   2  An untrained pooler is part of the head, for all methods.
RULES = 2


@dataclass(frozen=True)
class Run:
    """
    One training: a model on a task by a method, with a learning rate and a seed.

    Args:
        model ([`Model`]), task ([`Task`]), method ([`Method`]): What is trained on what, and how.
        learning_rate (`float`): The peak of the schedule.
        seed (`int`): Of the head, the order of the data and dropout.
    """

    model: Model
    task: Task
    method: Method
    learning_rate: float
    seed: int

    @property
    def spec(self) -> dict[str, Any]:
        """All that the result depends on, as JSON holds it: no path, and nothing of the study that asks for it."""
        return {
            "recipe": self.task.recipe,
            "task": self.task.name,
            "model": self.model.model_name_or_path,
            "method": self.method.name,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "arguments": {**self.task.arguments, **self.method.arguments},
            "rules": RULES,
        }

    @property
    def id(self) -> str:
        """A readable name with a digest of the whole [`spec`]: the tables that share a run share its file."""
        digest = hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:8]
        names = (self.task.name, self.model.name, self.method.name, f"lr{self.learning_rate:g}", f"seed{self.seed}")
        return "-".join(re.sub(r"[^\w.+]", "_", word) for word in (*names, digest))

    def arguments(self) -> dict[str, Any]:
        """The recipe's options, without those that name places on this machine."""
        return {
            **self.task.arguments,
            **self.method.arguments,
            "method": self.method.name,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Cell:
    """
    One model on one task by one method, with all learning rates and seeds.

    Args:
        model ([`Model`]), task ([`Task`]), method ([`Method`]): What the cell is about.
        learning_rates (`tuple[float, ...]`): The grid, ascending.
        seeds (`dict[int, int]`): Each seed with the number of the study's part that asks for it; the first seed
            searches the grid.
        seeds_at_best (`bool`): Whether the other seeds run at the chosen rate only.
        position (`int`): In the study, from 0.
    """

    model: Model
    task: Task
    method: Method
    learning_rates: tuple[float, ...]
    seeds: dict[int, int]
    seeds_at_best: bool
    position: int

    def run(self, learning_rate: float, seed: int) -> Run:
        """One of the cell's runs."""
        return Run(self.model, self.task, self.method, learning_rate, seed)

    @property
    def first_seed(self) -> int:
        """The seed that every learning rate is tried with."""
        return next(iter(self.seeds))

    @property
    def size(self) -> int:
        """How many runs the cell consists of, whichever rate is chosen."""
        grid, more = len(self.learning_rates), len(self.seeds) - 1
        return grid + more if self.seeds_at_best else grid * (more + 1)

    def grid(self) -> list[Run]:
        """The runs of the first seed, from the middle of the grid outwards: the first alone is already informative."""
        middle = (len(self.learning_rates) - 1) / 2
        rates = sorted(self.learning_rates, key=lambda rate: abs(self.learning_rates.index(rate) - middle))
        return [self.run(rate, self.first_seed) for rate in rates]

    def possible(self) -> list[Run]:
        """Every run that the cell may use: the whole of rates × seeds."""
        return [self.run(rate, seed) for seed in self.seeds for rate in self.learning_rates]

    def wanted(self, chosen: float | None) -> list[Run]:
        """The runs that are known to be needed.

        Args:
            chosen (`float`, *optional*): The learning rate that the first seed chose; `None` while its grid is
                incomplete.
        """
        runs = self.grid()
        for seed in list(self.seeds)[1:]:
            if not self.seeds_at_best or len(self.learning_rates) == 1:
                runs += [self.run(rate, seed) for rate in self.learning_rates]
            elif chosen is not None:
                runs.append(self.run(chosen, seed))
        return runs

    def waiting(self, chosen: float | None) -> int:
        """How many more runs there will be once the learning rate is chosen."""
        return self.size - len(self.wanted(chosen))

    def urgency(self, run: Run) -> tuple[int, int, int]:
        """Runs are done in this order: by part, first every cell once, then the grids, then further seeds."""
        rounds = [one.id for one in self.wanted(run.learning_rate)]
        return self.seeds[run.seed], rounds.index(run.id), self.position


def expand(config: StudyConfig, studies: Iterable[str]) -> list[Cell]:
    """The cells of some studies, each once, in the order of their parts.

    Args:
        config ([`StudyConfig`]): Where they are described.
        studies (`Iterable[str]`): `"table3"`, ….
    """
    seeds: dict[tuple[str, str, str], dict[int, int]] = {}
    rates: dict[tuple[str, str, str], set[float]] = {}
    parts = [part for study in studies for part in config.parts(study)]
    for number, part in enumerate(parts):
        for key in itertools.product(part.models, part.tasks, part.methods):
            _, task, method = key
            for seed in part.seeds:
                seeds.setdefault(key, {}).setdefault(seed, number)
            grids = (part.learning_rates, config.tasks[task].learning_rates)  # the nearer one first
            grid = next((one[method] for one in grids if method in one), config.methods[method].learning_rates)
            rates.setdefault(key, set()).update(grid)
    return [
        Cell(
            config.models[model],
            config.tasks[task],
            config.methods[method],
            tuple(sorted(rates[model, task, method])),
            found,
            config.seeds_at_best,
            position,
        )
        for position, ((model, task, method), found) in enumerate(seeds.items())
    ]


@dataclass(frozen=True)
class Selection:
    """
    Which of the runs to do now; what is shown does not depend on it.

    Args:
        models, tasks, methods, seeds, learning_rates (*optional*): Only these; `None` for all.
        shard (`tuple[int, int]`): `(i, n)`: only every n-th cell, from the i-th on, counted from 0. A cell's runs stay
            together, since its later seeds depend on its grid.
    """

    models: Collection[str] | None = None
    tasks: Collection[str] | None = None
    methods: Collection[str] | None = None
    seeds: Collection[int] | None = None
    learning_rates: Collection[float] | None = None
    shard: tuple[int, int] = (0, 1)

    def cell(self, cell: Cell) -> bool:
        """Whether any of a cell's runs can be meant."""
        return (
            cell.position % self.shard[1] == self.shard[0]
            and (self.models is None or cell.model.name in self.models)
            and (self.tasks is None or cell.task.name in self.tasks)
            and (self.methods is None or cell.method.name in self.methods)
        )

    def run(self, run: Run) -> bool:
        """Whether a run of a selected cell is meant."""
        return (self.seeds is None or run.seed in self.seeds) and (
            self.learning_rates is None or run.learning_rate in self.learning_rates
        )

    def check(self, cells: Iterable[Cell]) -> None:
        """Names that occur nowhere in the plan are mistakes.

        Raises:
            `ValueError`: With what was given and what there is.
        """
        cells = list(cells)
        for option, given, known in (
            ("--models", self.models, {cell.model.name for cell in cells}),
            ("--tasks", self.tasks, {cell.task.name for cell in cells}),
            ("--methods", self.methods, {cell.method.name for cell in cells}),
            ("--seeds", self.seeds, {seed for cell in cells for seed in cell.seeds}),
            ("--learning_rates", self.learning_rates, {rate for cell in cells for rate in cell.learning_rates}),
        ):
            if given is not None and (unknown := sorted(set(given) - known, key=str)):
                raise ValueError(
                    f"{option} {' '.join(map(str, unknown))}: not in this study, which has "
                    f"{', '.join(map(str, sorted(known, key=str)))}."
                )
