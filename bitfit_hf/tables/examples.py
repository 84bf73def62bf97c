"""Rows as examples: the texts and what is to be predicted, with the rows that cannot be examples told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import TableError
from .columns import Columns
from .problem import Kind, Problem, as_list, names_in, number, words_in
from .table import Table, is_missing


@dataclass
class Examples:
    """
    Examples in memory.

    Args:
        texts (`list[tuple[str, ...]]` or `list[list[str]]`): One or two texts each, or the words to classify.
        labels (`list[Any]`): A label's id, a number, 0.0 or 1.0 for each label, or a label's id for each word.
    """

    texts: list[Any]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: list[int]) -> Examples:
        """Some of them."""
        return Examples([self.texts[i] for i in indices], [self.labels[i] for i in indices])


def complete_rows(table: Table, columns: Columns, *, kind: Kind | None, skip: bool) -> tuple[Table, int]:
    """Sees to it that every row has its texts and its label.

    Args:
        table ([`Table`]): The table.
        columns ([`Columns`]): The columns.
        kind ([`Kind`], *optional*): As the user says. Of several labels a row may have none.
        skip (`bool`): Leaves rows out that lack something, instead of raising.

    Returns:
        `tuple[Table, int]`: The complete rows, and how many were left out.

    Raises:
        [`TableError`]: A row lacks a text or a label, or a text is something else; or nothing is left.
    """
    for column in columns.texts:
        for index, row in enumerate(table.rows):
            value = row.get(column)
            if not is_missing(value) and not isinstance(value, str) and as_list(value) is None:
                raise TableError(
                    f'{table.place(index)}: "{column}" is {value!r:.40}, a {type(value).__name__} and no text. Name '
                    "the column of the texts with --text."
                )
    kept: list[int] = []
    gone: list[int] = []
    first = ""
    for index, row in enumerate(table.rows):
        reason = _lacking(row, columns, kind)
        (gone if reason else kept).append(index)
        first = first or reason
    if gone and not skip:
        raise TableError(
            f"{table.places(gone)}: {first}. Mend the table, or pass --skip-incomplete to leave such rows out."
        )
    if not kept:
        raise TableError(f"{table.name} has no row with a text and a label ({first}).")
    return (table.select(kept) if gone else table), len(gone)


def _lacking(row: dict[str, Any], columns: Columns, kind: Kind | None) -> str:
    for column in columns.texts:
        if is_missing(row.get(column)) or as_list(row.get(column)) == []:
            return f'the text in "{column}" is empty'
    if kind is Kind.MULTI_LABEL and len(columns.labels) == 1:
        return ""
    for column in columns.labels:
        if is_missing(row.get(column)):
            return f'the label in "{column}" is missing'
    return ""


def to_examples(table: Table, columns: Columns, problem: Problem) -> Examples:
    """Makes examples of complete rows.

    Args:
        table ([`Table`]): The rows.
        columns ([`Columns`]): Their columns.
        problem ([`Problem`]): The task, with the names of its labels.

    Raises:
        [`TableError`]: A row holds a label that the task does not have, or not one tag for each word.
    """
    ids = {name: index for index, name in enumerate(problem.labels)}
    texts: list[Any] = []
    labels: list[Any] = []
    for index, row in enumerate(table.rows):
        if problem.kind is Kind.TOKENS:
            words = [str(word) for word in words_in(table, index, columns.text)]
            texts.append(words)
        else:
            texts.append(tuple(str(row[column]) for column in columns.texts))
        if problem.kind is Kind.REGRESSION:
            value = number(row.get(columns.labels[0]))
            if value is None:
                raise TableError(f"{table.place(index)}: {row.get(columns.labels[0])!r:.40} is not a number.")
            labels.append(value)
            continue
        names = names_in(table, index, columns, problem)
        unknown = next((name for name in names if name not in ids), None)
        if unknown is not None:
            raise TableError(
                f'{table.place(index)}: the label "{unknown}" is none of the task\'s: {", ".join(problem.labels)}.'
            )
        if problem.kind is Kind.CLASSIFICATION:
            labels.append(ids[names[0]])
        elif problem.kind is Kind.MULTI_LABEL:
            labels.append([float(name in names) for name in problem.labels])
        else:
            if len(names) != len(words):
                raise TableError(
                    f'{table.place(index)}: {len(words)} words in "{columns.text}" and {len(names)} labels in '
                    f'"{columns.labels[0]}". Each word has one.'
                )
            labels.append([ids[name] for name in names])
    return Examples(texts, labels)
