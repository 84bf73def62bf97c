"""Reading a table, wherever it is: a file, a folder with a file for each split, or a data set on the Hub."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError, TableError
from .delimited import read_delimited
from .table import Table

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
EVALUATION_SPLITS = ("validation", "dev", "valid", "test")

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Source:
    """
    Where a table is, and how to read it.

    Args:
        name (`str`): A file, a folder, or a data set on the Hub.
        config (`str`, *optional*): Which part of the data set on the Hub.
        revision (`str`, *optional*): Of the data set on the Hub.
        token (`str`, *optional*): For private data sets.
        encoding (`str`, *optional*): Of a text file; UTF-8 by default.
        separator (`str`, *optional*): Of a CSV file; by default what its header shows.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    token: str | None = None
    encoding: str | None = None
    separator: str | None = None


def read_split(source: Source, split: str) -> Table:
    """Reads one split.

    Args:
        source ([`Source`]): A folder or a data set on the Hub.
        split (`str`): Its name.

    Raises:
        [`TableError`]: There is no such split, or it cannot be read.
    """
    splits = _splits(source)
    if splits is None:
        raise TableError(f"{source.name} is one table, it has no splits to choose from.")
    if split not in splits:
        raise TableError(f"{source.name} has no split {split!r}, only {', '.join(splits)}.")
    return splits[split]()


def read_tables(source: Source, *, split: str = "train") -> tuple[Table, Table | None]:
    """Reads the rows to train on, and those to evaluate on where there are any.

    Args:
        source ([`Source`]): Where they are.
        split (`str`, *optional*, defaults to `"train"`): Which split to train on, where there are several.

    Returns:
        `tuple[Table, Table | None]`: The second is the split `validation`, `dev` or `valid`, or else `test`.

    Raises:
        [`TableError`]: There is no such table, or it cannot be read.
    """
    splits = _splits(source)
    if splits is None:
        return read_file(Path(source.name).expanduser(), encoding=source.encoding, separator=source.separator), None
    train = read_split(source, split)
    other = next((name for name in EVALUATION_SPLITS if name in splits and name != split), None)
    return train, None if other is None else splits[other]()


def read_one(source: Source, *, split: str | None = None) -> Table:
    """Reads the rows to evaluate on: a file, or the evaluation split of a folder or a data set.

    Raises:
        [`TableError`]: There is no such table, or it cannot be read.
    """
    if split is not None:
        return read_split(source, split)
    splits = _splits(source)
    if splits is None:
        return read_file(Path(source.name).expanduser(), encoding=source.encoding, separator=source.separator)
    name = next((name for name in EVALUATION_SPLITS if name in splits), None)
    if name is None:
        raise TableError(f"Say which split of {source.name} to take with --split: {', '.join(splits)}.")
    return splits[name]()


def _splits(source: Source) -> dict[str, Callable[[], Table]] | None:
    """A way to read each split; `None` for a single file."""
    path = Path(source.name).expanduser()
    if path.is_file():
        return None
    if path.is_dir():
        files = {file.name.partition(".")[0]: file for file in sorted(path.iterdir()) if _suffix(file) in SUFFIXES}
        if not files:
            raise TableError(f"{source.name} holds no table: no file that ends in {', '.join(SUFFIXES)}.")
        return {
            name: partial(read_file, file, encoding=source.encoding, separator=source.separator)
            for name, file in files.items()
        }
    looks_like_a_path = path.is_absolute() or source.name.startswith((".", "~")) or len(path.parts) > 2
    if looks_like_a_path or _suffix(path) in SUFFIXES:
        raise TableError(f"There is no file {source.name}.")
    return _on_hub(source)


def _on_hub(source: Source) -> dict[str, Callable[[], Table]]:
    try:
        from .hub_data import load_from_hub
    except ImportError as error:
        raise MissingDependencyError(
            f"There is no file {source.name}, and for a data set on the Hub the package `datasets` is needed: "
            "`pip install bitfit-hf[train]`."
        ) from error
    try:
        splits = load_from_hub(source.name, source.config, revision=source.revision, token=source.token)
    except Exception as error:  # whatever a data set, or the way to it, can be wrong with
        raise TableError(
            f"There is no file {source.name}, and as a data set on the Hub it cannot be loaded: {error}"
        ) from error
    return {name: partial(_of_hub, source.name, name, rows) for name, rows in splits.items()}


def _of_hub(name: str, split: str, rows: Any) -> Table:
    from datasets import ClassLabel

    names = {}
    for column, feature in rows.features.items():
        inner = getattr(feature, "feature", feature)  # of a list
        if isinstance(inner, ClassLabel):
            names[column] = list(inner.names)
    columns = list(rows.column_names)
    return Table(
        f"{name} ({split})",
        columns,
        rows.to_list(),
        list(range(1, len(rows) + 1)),
        label_names=names,
        hub=rows,
    )


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return f".{name.rpartition('.')[2]}" if "." in name else ""


def read_file(path: Path, *, encoding: str | None = None, separator: str | None = None) -> Table:
    """Reads a table from a file, by what its name ends in; text files may be packed with gzip.

    Args:
        path (`Path`): The file.
        encoding (`str`, *optional*), separator (`str`, *optional*): As in [`Source`].

    Raises:
        [`TableError`]: It is none of the known kinds, is damaged, or holds no rows.
    """
    kind = _suffix(path)
    if kind not in SUFFIXES:
        raise TableError(f"{path.name} is no table that can be read: it has to end in {', '.join(SUFFIXES)}.")
    if kind == ".parquet":
        return _read_parquet(path)
    text = _text(path, encoding)
    if not text.strip():
        raise TableError(f"{path.name} is empty.")
    if kind == ".csv":
        return read_delimited(text, path.name, separator=separator)
    if kind == ".tsv":
        return read_delimited(text, path.name, separator=separator or "\t")
    return _read_json(text, path.name)


def _text(path: Path, encoding: str | None) -> str:
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise TableError(f"{path.name} cannot be read: {error}.") from error
    marked = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    try:
        return data.decode(encoding or marked or "utf-8")
    except LookupError:
        raise TableError(f"--encoding {encoding} is none that Python knows; for example utf-8 or latin-1.") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TableError(
            f"{path.name}, line {line}: byte 0x{data[error.start]:02x} is no {encoding or 'UTF-8'} text. Pass the "
            "file's own encoding, for example --encoding latin-1 or --encoding cp1252."
        ) from None


def _read_json(text: str, name: str) -> Table:
    """An array of objects, or one object in each line."""
    if text.lstrip().startswith("["):
        entries, unit = _decoded(text, name), "row"
        numbers = list(range(1, len(entries) + 1))
    else:
        numbers = [number for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        lines = text.split("\n")
        entries, unit = [_decoded(lines[number - 1], f"{name}, line {number}") for number in numbers], "line"
    if not entries:
        raise TableError(f"{name} has no rows.")
    for number, entry in zip(numbers, entries):
        if not isinstance(entry, dict):
            raise TableError(
                f"{name}, {unit} {number}: {json.dumps(entry):.40} is no object with a value for each column."
            )
    columns = list(dict.fromkeys(column for entry in entries for column in entry))
    return Table(name, columns, entries, numbers, unit=unit)


def _decoded(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TableError(f"{place}: this is no JSON ({error}).") from None


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"To read {path.name} the package `pyarrow` is needed: `pip install bitfit-hf[train]`."
        ) from error
    try:
        values = parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise TableError(f"{path.name} cannot be read: {' '.join(str(error).split())[:200]}.") from error
    if not values.num_rows:
        raise TableError(f"{path.name} has no rows.")
    return Table(path.name, list(values.column_names), values.to_pylist(), list(range(1, values.num_rows + 1)))
