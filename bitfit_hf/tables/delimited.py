"""Tables of separated values, CSV and TSV, read strictly: a row that does not fit the header is an error."""

from __future__ import annotations

import csv
import io
import sys
from typing import Literal

from ..errors import TableError
from .table import Table, listed

# What stands between the values of files that are called CSV. The comma of the name is a semicolon where the comma is
# the decimal sign.
SEPARATORS = (",", ";", "\t", "|")


def read_delimited(text: str, name: str, *, separator: str | None = None) -> Table:
    """Reads a table with a header.

    Args:
        text (`str`): The file's content.
        name (`str`): What messages call the file.
        separator (`str`, *optional*): Between two values. By default the one that divides the header most.

    Returns:
        [`Table`]: All values are text.

    Raises:
        [`TableError`]: It has no header, no rows, two columns of one name, or a row of another length.
    """
    separator = separator or max(SEPARATORS, key=lambda sign: _header_length(text, sign))
    if separator != "\t":
        return _parse(text, name, separator, csv.QUOTE_MINIMAL)
    # Some programs quote in files with tabs, others write quotation marks as they are.
    try:
        table = _parse(text, name, separator, csv.QUOTE_MINIMAL)
    except TableError:
        return _parse(text, name, separator, csv.QUOTE_NONE)
    across = any("\n" in value or "\t" in value for row in table.rows for value in row.values())
    return _parse(text, name, separator, csv.QUOTE_NONE) if across else table


def _header_length(text: str, separator: str) -> int:
    return len(next(csv.reader(io.StringIO(text), delimiter=separator), []))


def _parse(text: str, name: str, separator: str, quoting: Literal[0, 3]) -> Table:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a text may be longer than 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    header: list[str] | None = None
    rows, lines = [], []
    begin = 1
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise TableError(
                f"{name}, line {begin}: the row cannot be read ({error}). A quotation mark inside a quoted text is "
                "written twice."
            ) from None
        if values is None:
            break
        if values and header is None:
            header = _named(values, name)
        elif values and header is not None:
            if len(values) != len(header):
                raise TableError(
                    f"{name}, line {begin}: {len(values)} values, but the header has {len(header)} columns. A text "
                    f"that holds the separator {separator!r} has to stand in double quotes."
                )
            rows.append(dict(zip(header, values)))
            lines.append(begin)
        begin = reader.line_num + 1
    if header is None:
        raise TableError(f"{name} is empty.")
    if not rows:
        raise TableError(f"{name} has a header and no rows.")
    return Table(name, header, rows, lines, unit="line")


def _named(values: list[str], name: str) -> list[str]:
    """The names of the columns; one without a name, such as the index that pandas writes, goes by its number."""
    header = [value.strip() or f"column {number}" for number, value in enumerate(values, start=1)]
    twice = [column for column in dict.fromkeys(header) if header.count(column) > 1]
    if twice:
        raise TableError(f"{name}, line 1: the header names {listed(twice)} more than once. Rename one of them.")
    return header
