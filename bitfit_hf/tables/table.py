"""[`Table`]: rows in memory, and where each of them stands in its file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_SHOWN = 5  # places or columns that a message lists


@dataclass
class Table:
    """
    Rows of a file or of a data set on the Hub.

    Args:
        name (`str`): What messages call it: a file's name, or a data set with its split.
        columns (`list[str]`): In their order.
        rows (`list[dict[str, Any]]`): Values by column. A column that a row lacks is missing in it.
        numbers (`list[int]`): For each row the line that it begins in, or its number; both are counted from 1.
        unit (`str`, *optional*, defaults to `"row"`): What `numbers` count: `"line"` of a text file, or `"row"`.
        label_names (`dict[str, list[str]]`, *optional*): Of columns whose values are ids, the names by id.
        hub (`datasets.Dataset`, *optional*): The data set on the Hub that the rows are from; cards name it.
    """

    name: str
    columns: list[str]
    rows: list[dict[str, Any]]
    numbers: list[int]
    unit: str = "row"
    label_names: dict[str, list[str]] = field(default_factory=dict)
    hub: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """Where a row is, for a message: `reviews.csv, line 13`."""
        return f"{self.name}, {self.unit} {self.numbers[index]}"

    def places(self, indices: Sequence[int]) -> str:
        """The first of several rows, and how many more there are."""
        more = f" (and {len(indices) - 1:,} more)" if len(indices) > 1 else ""
        return self.place(indices[0]) + more

    def select(self, indices: Iterable[int]) -> Table:
        """The table of some of its rows, which keep their places."""
        chosen = list(indices)
        rows = [self.rows[index] for index in chosen]
        return replace(self, rows=rows, numbers=[self.numbers[index] for index in chosen])


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: nothing, blank text, or NaN, also as the text that other programs write for it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip() in ("", "nan", "NaN")


def listed(names: Iterable[str]) -> str:
    """Columns or labels for a message, the first few of them."""
    every = [f'"{name}"' for name in names]
    more = f" and {len(every) - _SHOWN:,} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
