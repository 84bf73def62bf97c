"""A table as a task: its columns, its kind, its labels, and which rows are trained on and which evaluated on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import TableError
from ...tables.columns import Columns, find_columns
from ...tables.examples import Examples, complete_rows, to_examples
from ...tables.problem import Kind, Problem, find_problem
from ...tables.reading import Source, read_one, read_tables
from ...tables.split import split_rows
from ...tables.table import Table


@dataclass(frozen=True)
class Wanted:
    """
    What the user says of the table.

    Args:
        source ([`Source`]): Where it is.
        split (`str`): The split to train on, where there are several.
        evaluation ([`Source`], *optional*): Where rows to evaluate on are.
        eval_split (`str`, *optional*): Their split.
        text (`str`, *optional*), text2 (`str`, *optional*), labels (`Sequence[str]`): Columns.
        kind ([`Kind`], *optional*): The kind of task.
        label_separator (`str`, *optional*): Between several labels in one cell.
        skip_incomplete (`bool`): Leaves out rows without a text or a label.
        limit (`int`, *optional*): Takes the first rows only.
    """

    source: Source
    split: str = "train"
    evaluation: Source | None = None
    eval_split: str | None = None
    text: str | None = None
    text2: str | None = None
    labels: Sequence[str] = ()
    kind: Kind | None = None
    label_separator: str | None = None
    skip_incomplete: bool = False
    limit: int | None = None


@dataclass
class Task:
    """
    What there is to learn.

    Args:
        name (`str`): The table's, without folders.
        columns ([`Columns`]): Where texts and labels stand.
        problem ([`Problem`]): Kind and labels.
        train ([`Examples`]), evaluation ([`Examples`]): The rows.
        split (`str`): How they came apart, in words.
        skipped (`int`): Rows left out, since they lacked something.
        hub (`datasets.Dataset`, *optional*), eval_hub (`datasets.Dataset`, *optional*): Where on the Hub they are
            from.
        shared (`int`): Rows to evaluate on whose text is trained on too.
    """

    name: str
    columns: Columns
    problem: Problem
    train: Examples
    evaluation: Examples
    split: str
    skipped: int = 0
    hub: Any = None
    eval_hub: Any = None
    shared: int = field(init=False)

    def __post_init__(self) -> None:
        trained = {tuple(texts) for texts in self.train.texts}
        self.shared = sum(tuple(texts) in trained for texts in self.evaluation.texts)


def read_task(wanted: Wanted, *, eval_share: float, seed: int) -> Task:
    """Reads and checks a table.

    Args:
        wanted ([`Wanted`]): What the user says of it.
        eval_share (`float`): Of the rows, to evaluate on, where the table has no split.
        seed (`int`): Of that split.

    Raises:
        [`TableError`]: The table cannot be trained on.
    """
    table, other = read_tables(wanted.source, split=wanted.split)
    if wanted.evaluation is not None:
        other = read_one(wanted.evaluation, split=wanted.eval_split)
    elif wanted.eval_split is not None:
        other = read_one(wanted.source, split=wanted.eval_split)
    if wanted.limit is not None:
        table = table.select(range(min(wanted.limit, len(table))))
    columns = find_columns(table, text=wanted.text, text2=wanted.text2, labels=wanted.labels)
    table, skipped = complete_rows(table, columns, kind=wanted.kind, skip=wanted.skip_incomplete)
    if other is not None:
        other = _evaluation_rows(other, columns, wanted)
    tables = [table] if other is None else [table, other]
    problem = find_problem(tables, columns, wanted.kind, wanted.label_separator)
    examples = to_examples(table, columns, problem)
    if other is not None:
        evaluation, hub = to_examples(other, columns, problem), other.hub
        split = f"the rows of {other.name}"
    else:
        kept, apart = split_rows(examples, problem, table=table, share=eval_share, seed=seed)
        examples, evaluation, hub = examples.select(kept), examples.select(apart), table.hub
        how = "the same share of each label" if problem.kind is Kind.CLASSIFICATION else "drawn at random"
        split = f"set apart from {table.name}, {how}, seed {seed}"
    return Task(table.name, columns, problem, examples, evaluation, split, skipped, table.hub, hub)


def _evaluation_rows(table: Table, columns: Columns, wanted: Wanted) -> Table:
    """Complete rows of the table to evaluate on. Of a test split without labels, as GLUE has, nothing can be said."""
    for column in (*columns.texts, *columns.labels):
        if column not in table.columns:
            raise TableError(f'{table.name} has no column "{column}", which the rows to train on have.')
    names = table.label_names.get(columns.labels[0])
    if names and all(row.get(columns.labels[0]) == -1 for row in table.rows):
        raise TableError(f"{table.name} has no labels (all are -1); name another split with --eval-split.")
    return complete_rows(table, columns, kind=wanted.kind, skip=wanted.skip_incomplete)[0]


def balance(problem: Problem, examples: Examples) -> list[tuple[str, int]]:
    """Each label, and in how many rows (or words) it is; the most frequent first."""
    counts: Counter[int] = Counter()
    for label in examples.labels:
        if problem.kind is Kind.CLASSIFICATION:
            counts[label] += 1
        elif problem.kind is Kind.MULTI_LABEL:
            counts.update(index for index, value in enumerate(label) if value)
        elif problem.kind is Kind.TOKENS:
            counts.update(label)
    return [(problem.labels[index], count) for index, count in counts.most_common()]


@dataclass(frozen=True)
class Scale:
    """
    The unit that a regression is trained in: `(value − mean) / deviation`.

    One learning rate then does for stars from 1 to 5 and for prices in millions. After training the head's last layer
    takes the unit up, so the saved model answers in the label's own.
    """

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, problem: Problem, examples: Examples) -> Scale:
        """The scale of the labels to train on; that of a classification changes nothing."""
        if problem.kind is not Kind.REGRESSION:
            return cls()
        values = np.asarray(examples.labels, dtype=np.float64)
        return cls(float(values.mean()), float(values.std()))

    def inward(self, examples: Examples) -> Examples:
        """Examples in the unit that is trained in."""
        if self == Scale():
            return examples
        return Examples(examples.texts, [(value - self.mean) / self.deviation for value in examples.labels])
