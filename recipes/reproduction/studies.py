"""What a table, a figure or a study of the paper consists of: read from a YAML file, as models × tasks × methods.

```yaml
name: minilm_cpu                       # results go to <results_dir>/<name>
about: One paragraph that every output starts with.
seeds_at_best: true                    # seeds after the first only at the learning rate chosen with the first
score: best                            # dev score of the best epoch, or of the final one
models: {MiniLM: {model_name_or_path: org/name, paper: BERT-base}}
arguments: {batch_size: 16}            # of every recipe
methods: {bitfit: {learning_rates: [1e-3, 4e-3], arguments: {weight_decay: 0.0}}}
tasks:
  rte: {recipe: glue, arguments: {task: rte, epochs: 8}, columns: {RTE: accuracy}, rows: 2490, tokens: 60}
studies:
  table3: [{models: [MiniLM], tasks: [rte], methods: [bitfit], seeds: [0, 1, 2]}]
```

A study is a list of parts, and the order of the parts is the order of the runs: what comes first is done first, so
that a sweep that is cut short leaves a useful table. A task may give `learning_rates` by method, in place of the
method's grid, for runs that are too long for the whole of it; so may a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STUDIES = ("defaults", "one_epoch", "table1", "table2", "table3", "figure1", "figure2", "generalization_gap", "pos")
SCORES = ("best", "final")


class StudyError(ValueError):
    """A study's YAML file does not say what it must, or says what it cannot."""


@dataclass(frozen=True)
class Model:
    """
    A pre-trained model.

    Args:
        name (`str`): What the tables call it.
        model_name_or_path (`str`): Its name on the Hub.
        paper (`str`, *optional*): The model whose figures of the paper stand beside ours.
    """

    name: str
    model_name_or_path: str
    paper: str | None = None


@dataclass(frozen=True)
class Task:
    """
    A data set with its size and training schedule.

    Args:
        name (`str`): Short, it is part of the runs' names.
        recipe (`str`): Module in `recipes/` with a `main(argv)`.
        columns (`dict[str, str]`): What the table's columns are called, and the metric that stands in each. The first
            is what the learning rate is chosen by.
        arguments (`dict[str, Any]`): Of the recipe.
        rows (`int`, *optional*): Training examples of the whole data set; with `tokens` for the estimated cost.
        tokens (`float`, *optional*): Mean length of an example, in tokens.
        in_percent (`bool`, *optional*, defaults to `False`): Whether the recipe's metrics go from 0 to 100.
        paper (`bool`, *optional*, defaults to `True`): Whether the paper's figures are of this data set.
        learning_rates (`dict[str, tuple[float, ...]]`, *optional*): By method, in place of the method's grid.
    """

    name: str
    recipe: str
    columns: dict[str, str]
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    tokens: float | None = None
    in_percent: bool = False
    paper: bool = True
    learning_rates: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """What the learning rate is chosen by."""
        return next(iter(self.columns.values()))

    @property
    def dev_halves(self) -> bool:
        """Whether one half of the dev set is chosen on and the other reported."""
        return bool(self.arguments.get("dev_halves", False))

    @property
    def train_rows(self) -> int | None:
        """Training examples that a run sees in an epoch."""
        wanted = self.arguments.get("train_size")
        known = [size for size in (wanted, self.rows) if size is not None]
        return min(known) if known else None

    @property
    def trained_tokens(self) -> float | None:
        """Tokens that a run trains on, all epochs together; `None` where the file does not say enough."""
        epochs = self.arguments.get("epochs")
        if self.train_rows is None or self.tokens is None or epochs is None:
            return None
        floor = self.arguments.get("min_steps", 0) * self.arguments.get("batch_size", 0)
        return self.tokens * max(self.train_rows * epochs, floor)


@dataclass(frozen=True)
class Method:
    """
    A way of adapting the model, with its grid.

    Args:
        name (`str`): As the recipes' `--method` takes it.
        learning_rates (`tuple[float, ...]`): The grid, ascending.
        arguments (`dict[str, Any]`): Of the recipe, in addition to the task's.
    """

    name: str
    learning_rates: tuple[float, ...]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """
    Runs that belong together: every model × task × method × learning rate × seed of these.

    Args:
        models, tasks, methods (`tuple[str, ...]`): Names in the same file.
        seeds (`tuple[int, ...]`): The first one of a cell searches the grid.
        learning_rates (`dict[str, tuple[float, ...]]`, *optional*): By method, in place of its whole grid.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rates: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyConfig:
    """A YAML file of studies; see the module's docstring for the fields."""

    name: str
    models: dict[str, Model]
    tasks: dict[str, Task]
    methods: dict[str, Method]
    studies: dict[str, tuple[Part, ...]]
    about: str = ""
    seeds_at_best: bool = True
    score: str = "best"
    ms_per_token: dict[str, float] = field(default_factory=dict)

    def parts(self, study: str) -> tuple[Part, ...]:
        """The parts of one study.

        Raises:
            [`StudyError`]: The file has no such study.
        """
        if study not in self.studies:
            raise StudyError(
                f"The study config {self.name!r} has no {study!r}. It has {', '.join(self.studies)}; "
                "choose one of them or another --config."
            )
        return self.studies[study]


def read_config(path: str | Path) -> StudyConfig:
    """Reads and checks a study config.

    Args:
        path (`str` or `Path`): Of the YAML file.

    Raises:
        [`StudyError`]: It is not there, no YAML, or does not fit together; all problems at once.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StudyError(f"{path}: cannot be read as YAML: {error}") from error
    try:
        config = _parse(values)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise StudyError(
            f"{path}: a value has the wrong form ({type(error).__name__}: {error}). "
            "The docstring of recipes/reproduction/studies.py shows every field."
        ) from error
    if problems := _problems(config):
        raise StudyError(f"{path} does not fit together:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return config


def _parse(values: Any) -> StudyConfig:
    if not isinstance(values, Mapping):
        raise StudyError(f"expected a mapping, got {type(values).__name__}.")
    _known(values, {item.name for item in dataclasses.fields(StudyConfig)} | {"arguments"}, "the file")
    shared = values.get("arguments") or {}
    models = {name: _make(Model, name, entry) for name, entry in values["models"].items()}
    tasks = {
        name: _make(
            Task,
            name,
            {
                **entry,
                "arguments": {**shared, **(entry.get("arguments") or {})},
                "learning_rates": _grids(entry.get("learning_rates")),
            },
        )
        for name, entry in values["tasks"].items()
    }
    methods = {name: _make(Method, name, entry) for name, entry in values["methods"].items()}
    methods = {
        name: dataclasses.replace(method, learning_rates=_grid(method.learning_rates))
        for name, method in methods.items()
    }
    studies = {
        study: tuple(_part(part, study, tuple(models)) for part in parts) for study, parts in values["studies"].items()
    }
    speeds = {name: float(value) for name, value in (values.get("ms_per_token") or {}).items()}
    return StudyConfig(
        name=str(values["name"]),
        models=models,
        tasks=tasks,
        methods=methods,
        studies=studies,
        about=" ".join(str(values.get("about") or "").split()),
        seeds_at_best=bool(values.get("seeds_at_best", True)),
        score=str(values.get("score", "best")),
        ms_per_token=speeds,
    )


def _known(entry: Any, fields: set[str], where: str) -> None:
    """An unknown field is an error: a misspelt one would otherwise do nothing, silently."""
    if not isinstance(entry, Mapping):
        raise StudyError(f"{where}: expected a mapping, got {entry!r:.60}.")
    if unknown := sorted(set(entry) - fields):
        raise StudyError(f"{where}: unknown fields {', '.join(unknown)}. There are {', '.join(sorted(fields))}.")


def _make(kind: type, name: str, entry: Any) -> Any:
    _known(entry, {item.name for item in dataclasses.fields(kind)} - {"name"}, f"{kind.__name__.lower()} {name}")
    return kind(name=name, **entry)


def _part(entry: Any, study: str, models: tuple[str, ...]) -> Part:
    _known(entry, {item.name for item in dataclasses.fields(Part)}, f"study {study}")
    return Part(
        models=tuple(entry.get("models", models)),
        tasks=tuple(entry["tasks"]),
        methods=tuple(entry["methods"]),
        seeds=tuple(int(seed) for seed in entry.get("seeds", [0])),
        learning_rates=_grids(entry.get("learning_rates")),
    )


def _grid(rates: Iterable[Any]) -> tuple[float, ...]:
    return tuple(sorted(float(rate) for rate in rates))  # YAML takes 1e-3, without a point, for text


def _grids(entry: Mapping[str, Iterable[Any]] | None) -> dict[str, tuple[float, ...]]:
    return {method: _grid(rates) for method, rates in (entry or {}).items()}


def _problems(config: StudyConfig) -> list[str]:
    found = []
    if not config.name.replace("_", "").replace("-", "").isalnum():
        found.append(f"name {config.name!r} becomes a folder: letters, digits, _ and - only")
    if config.score not in SCORES:
        found.append(f"score {config.score!r}: one of {', '.join(SCORES)}")
    found += [f"method {name} has no learning rates" for name, m in config.methods.items() if not m.learning_rates]
    found += [f"task {name} has no columns" for name, task in config.tasks.items() if not task.columns]
    for name, task in config.tasks.items():
        unknown = [method for method in task.learning_rates if method not in config.methods]
        found += [f"task {name}: learning rates of {method}, which is not defined" for method in unknown]
    found += [f"unknown study {name}: one of {', '.join(STUDIES)}" for name in config.studies if name not in STUDIES]
    for study, parts in config.studies.items():
        for part in parts:
            for kind, names, known in (
                ("model", part.models, config.models),
                ("task", part.tasks, config.tasks),
                ("method", part.methods, config.methods),
            ):
                found += [f"study {study}: {kind} {name} is not defined" for name in names if name not in known]
            for method in part.learning_rates:
                if method not in part.methods:
                    found.append(f"study {study}: learning rates of {method}, which is not in the part")
            if not part.seeds:
                found.append(f"study {study}: a part has no seeds")
    return found
