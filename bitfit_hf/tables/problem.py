"""What kind of task a table is, and the names of its labels."""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..errors import TableError
from .columns import Columns
from .table import Table, is_missing, listed


class Kind(str, Enum):
    """The kinds of tasks, under the names that `--task` takes."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    MULTI_LABEL = "multi-label"
    TOKENS = "token-classification"


WORDS = {
    Kind.CLASSIFICATION: "text classification",
    Kind.REGRESSION: "regression",
    Kind.MULTI_LABEL: "multi-label classification (any number of labels for each text)",
    Kind.TOKENS: "token classification (a label for each word)",
}

# Whole numbers of so many values are classes, such as stars; of more values they are amounts.
MOST_NUMBERED_CLASSES = 20
# Of a column of names, a value for every second row is no label but a text or an id.
FEWEST_ROWS_A_LABEL = 2
# Between several labels in one cell.
LABEL_SEPARATORS = ("|", ";", ",")

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_YES_NO = {"1": 1.0, "true": 1.0, "yes": 1.0, "0": 0.0, "false": 0.0, "no": 0.0}


@dataclass(frozen=True)
class Problem:
    """
    A task as a model has to know it.

    Args:
        kind ([`Kind`]): The kind.
        labels (`tuple[str, ...]`): Their names, by id; none for a regression.
        separator (`str`, *optional*): Between several labels in one cell.
    """

    kind: Kind
    labels: tuple[str, ...] = ()
    separator: str | None = None


def as_list(value: Any) -> list[Any] | None:
    """A cell that holds several values: a list, or the text that other programs write for one; else `None`."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str) and value.startswith("[") and value.rstrip().endswith("]"):
        try:
            found = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
        return found if isinstance(found, list) else None
    return None


def number(value: Any) -> float | None:
    """A cell that holds a number; else `None`."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        found = float(value)
        return found if math.isfinite(found) else None
    return None


def label_name(value: Any, names: Sequence[str] | None = None) -> str:
    """The name of one label: by its id where the column has names, else as it is written.

    Args:
        value (`Any`): A cell, or one entry of it.
        names (`Sequence[str]`, *optional*): Names by id, where the column has them.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # programs that know no empty integers write 3.0 for 3
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(value).strip()


def find_problem(
    tables: Sequence[Table], columns: Columns, kind: Kind | None = None, separator: str | None = None
) -> Problem:
    """Finds out what kind of task it is, and its labels.

    Args:
        tables (`Sequence[Table]`): The rows to train on, then those to evaluate on if they were given. None lacks a
            text or a label.
        columns ([`Columns`]): The columns.
        kind ([`Kind`], *optional*): As the user says; by default it is found.
        separator (`str`, *optional*): Between several labels in one cell, as the user says.

    Raises:
        [`TableError`]: The labels fit no kind, or not the one that was asked for; there is only one; there are too
            many.
    """
    asked = kind
    kind = kind or _find_kind(tables[0], columns, separator)
    if len(columns.labels) > 1 and kind is not Kind.MULTI_LABEL:
        raise TableError(f"With several columns of labels the task is multi-label, not {kind.value}.")
    if kind is Kind.TOKENS and columns.text2 is not None:
        raise TableError("A token classification has one column of words; leave --text2 out.")
    if kind is Kind.REGRESSION:
        return _regression(tables, columns)
    if kind is Kind.MULTI_LABEL:
        if len(columns.labels) > 1:
            return Problem(kind, columns.labels)
        if separator is None and all(as_list(row.get(columns.labels[0])) is None for row in tables[0].rows):
            separator = _find_separator(tables[0], columns.labels[0])
    problem = Problem(kind, separator=separator)
    names: dict[str, None] = {}
    seen: Counter[str] = Counter()
    for table in tables:
        for index in range(len(table)):
            found = names_in(table, index, columns, problem)
            names.update(dict.fromkeys(found))
            if table is tables[0]:
                seen.update(found)
    column = listed(columns.labels)
    known = tables[0].label_names.get(columns.labels[0])
    if not names or (len(names) < 2 and kind is not Kind.MULTI_LABEL):
        only = f'only one value, "{next(iter(names))}"' if names else "no value at all"
        raise TableError(f"The label column {column} of {tables[0].name} has {only}: there is nothing to learn.")
    if kind is Kind.CLASSIFICATION and asked is None and known is None:
        _refuse_free_text(tables[0], column, seen)
    _refuse_unknown(tables, columns, problem, seen)
    return Problem(kind, tuple(known) if known is not None else in_order(names), separator)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Labels in the order of their ids: numbers by their value, all others by the alphabet.

    `O`, which marks words outside of all entities, comes first, as the field has it.
    """
    every = set(names)
    if all(_NUMBER.fullmatch(name) for name in every):
        return tuple(sorted(every, key=float))
    return tuple(sorted(every, key=lambda name: (name != "O", name)))


def names_in(table: Table, index: int, columns: Columns, problem: Problem) -> list[str]:
    """The names of the labels of one row: one of a classification, any number of the others.

    Raises:
        [`TableError`]: The cell does not hold what the kind of task has.
    """
    row = table.rows[index]
    if len(columns.labels) > 1:
        return [column for column in columns.labels if _yes(table, index, column)]
    (column,) = columns.labels
    value, names = row.get(column), table.label_names.get(column)
    if problem.kind is Kind.CLASSIFICATION:
        if isinstance(value, (list, tuple, dict)):
            raise TableError(f'{table.place(index)}: "{column}" holds a {type(value).__name__}, not one label.')
        return [label_name(value, names)]
    if problem.kind is Kind.TOKENS:
        return [label_name(tag, names) for tag in words_in(table, index, column)]
    values = as_list(value)
    if values is None:
        if not isinstance(value, str) and not is_missing(value):
            raise TableError(f'{table.place(index)}: "{column}" holds {value!r:.40}, not several labels.')
        separator = problem.separator or LABEL_SEPARATORS[0]
        values = [] if is_missing(value) else [part for part in str(value).split(separator) if part.strip()]
    return list(dict.fromkeys(label_name(entry, names) for entry in values))


def words_in(table: Table, index: int, column: str) -> list[Any]:
    """The words of a sentence, or their tags: a list, or text with spaces between them.

    Raises:
        [`TableError`]: The cell holds neither.
    """
    value = table.rows[index].get(column)
    found = as_list(value)
    if found is None and isinstance(value, str):
        found = list(value.split())
    if found is None:
        raise TableError(f'{table.place(index)}: "{column}" holds {value!r:.40}, not a list of words.')
    return found


def _yes(table: Table, index: int, column: str) -> bool:
    value = table.rows[index].get(column)
    found = _YES_NO.get(label_name(value).lower())
    if found is None:
        raise TableError(
            f'{table.place(index)}: "{column}" is {value!r:.40}. Where each label has a column of its own, it holds 1 '
            "or 0."
        )
    return bool(found)


def _find_kind(table: Table, columns: Columns, separator: str | None) -> Kind:
    if any(as_list(row.get(columns.text)) is not None for row in table.rows[:20]):
        return Kind.TOKENS
    if len(columns.labels) > 1 or separator is not None:
        return Kind.MULTI_LABEL
    (column,) = columns.labels
    values = [row.get(column) for row in table.rows]
    if any(as_list(value) is not None for value in values[:20]):
        return Kind.MULTI_LABEL
    if column in table.label_names:
        return Kind.CLASSIFICATION
    numbers = [number(value) for value in values]
    _refuse_mixture(table, column, values, numbers)
    if any(value is None for value in numbers):
        return Kind.CLASSIFICATION
    found = Counter(value for value in numbers if value is not None)
    if any(not value.is_integer() for value in found):
        return Kind.REGRESSION
    # 77 classes that are numbered from 0 on are classes all the same.
    numbered = sorted(found) == list(range(len(found))) and len(values) >= 5 * len(found)
    return Kind.CLASSIFICATION if len(found) <= MOST_NUMBERED_CLASSES or numbered else Kind.REGRESSION


def _refuse_mixture(table: Table, column: str, values: list[Any], numbers: list[float | None]) -> None:
    """Numbers with a few texts among them, or the other way round, are mistakes in a table."""
    texts = [index for index, value in enumerate(numbers) if value is None]
    others = [index for index, value in enumerate(numbers) if value is not None]
    odd, usual = sorted((texts, others), key=len)
    typed = {isinstance(value, str) for value in values} == {True, False}  # JSON and Parquet tell text from numbers
    if odd and (typed or len(odd) <= max(1, len(values) // 10)):
        raise TableError(
            f'{table.places(odd)}: "{column}" is {values[odd[0]]!r:.40} there and {values[usual[0]]!r:.40} elsewhere, '
            "text and numbers mixed. Mend the column, or pass --task classification to take all of them as names."
        )


def _refuse_free_text(table: Table, column: str, seen: Counter[str]) -> None:
    if len(seen) > MOST_NUMBERED_CLASSES and len(seen) * FEWEST_ROWS_A_LABEL > len(table):
        raise TableError(
            f"The label column {column} of {table.name} has {len(seen):,} different values in {len(table):,} rows: "
            "that looks like a text or an id. Name another column with --label, or pass --task classification if "
            "these are labels."
        )


def _refuse_unknown(tables: Sequence[Table], columns: Columns, problem: Problem, seen: Counter[str]) -> None:
    """Labels to evaluate on that were never trained on; single words of a sentence may have such tags."""
    if problem.kind is Kind.TOKENS:
        return
    for table in tables[1:]:
        for index in range(len(table)):
            for name in names_in(table, index, columns, problem):
                if name not in seen:
                    raise TableError(
                        f'{table.place(index)}: the label "{name}" is in no row of {tables[0].name}, which is '
                        "trained on."
                    )


def _find_separator(table: Table, column: str) -> str:
    cells = [str(row.get(column) or "") for row in table.rows]
    found = {sign: sum(sign in cell for cell in cells) for sign in LABEL_SEPARATORS}
    best = max(found, key=found.__getitem__)
    if not found[best]:
        raise TableError(
            f'No cell of "{column}" in {table.name} holds several labels: none of {" ".join(LABEL_SEPARATORS)} is in '
            "any. Name what stands between them with --label-separator, or leave --task multi-label out."
        )
    return best


def _regression(tables: Sequence[Table], columns: Columns) -> Problem:
    (column,) = columns.labels
    for table in tables:
        for index, row in enumerate(table.rows):
            if number(row.get(column)) is None:
                raise TableError(
                    f'{table.place(index)}: "{column}" is {row.get(column)!r:.40}, not a number; a regression has '
                    "numbers as labels."
                )
    values = {number(row.get(column)) for row in tables[0].rows}
    if len(values) == 1:
        raise TableError(
            f'The label column "{column}" of {tables[0].name} has only one value, {values.pop():g}: there is nothing '
            "to learn."
        )
    return Problem(Kind.REGRESSION)
