"""The results of commands as text for a terminal: names with values, and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import typer
from rich.cells import cell_len

from .text import printable, width

_SHOWN = 12  # entries of a long list


def facts(rows: Iterable[tuple[str, object]], title: str | None = None) -> str:
    """Names and values, without those that are not known. A value is wrapped between words, a path is never broken."""
    known = [(name, printable(value)) for name, value in rows if value not in (None, "")]
    indent = max((len(name) for name, _ in known), default=0) + 2
    lines = [] if title is None else [typer.style(title, bold=True)]
    for name, value in known:
        space = max(width() - indent - 1, 20)
        first, *others = textwrap.wrap(value, space, break_long_words=False, break_on_hyphens=False) or [""]
        lines.append(typer.style(name.ljust(indent), bold=True) + first)
        lines += [" " * indent + line for line in others]
    return "\n".join(lines)


def columns(title: str, names: list[str], rows: Iterable[Iterable[object]], *, left: int = 1) -> str:
    """A table whose first `left` columns are text and whose others are numbers; `None` is shown as a dash.

    A row that is wider than the terminal goes on in its next line, and stays whole where it is copied.
    """
    cells = [["-" if value is None or value == "" else printable(value) for value in row] for row in rows]
    sizes = [max(map(cell_len, column)) for column in zip(names, *cells)]

    def line(values: list[str]) -> str:
        padded = []
        for index, (value, size) in enumerate(zip(values, sizes)):
            space = " " * (size - cell_len(value))
            padded.append(value + space if index < left else space + value)
        return "  ".join(padded).rstrip()

    return "\n".join([typer.style(title, bold=True), typer.style(line(names), dim=True), *map(line, cells)])


def delta_tables(values: dict[str, Any]) -> list[str]:
    """The result of `bitfit inspect` on a delta."""
    counts = values["parameters"]
    summary = facts(
        [
            ("base model", values["base_model"]),
            ("revision", values["revision"]),
            ("task", values["task_type"]),
            ("bias parameters", f"{counts['biases']:,}{_share(counts)}"),
            ("head parameters", f"{counts['head']:,}"),
            ("rows of added tokens", f"{counts['tokens']:,}" if counts["tokens"] else None),
            ("together", f"{counts['total']:,}"),
            ("added tokens", f"{values['added_tokens']:,}" if values["added_tokens"] else None),
            ("added biases", f"{values['added_biases']:,}" if values["added_biases"] else None),
            ("head", ", ".join(f"{name} {shape}" for name, shape in values["head"].items()) or "none"),
            ("labels", _listed(values["labels"] or [])),
            ("problem type", values["problem_type"]),
            ("files", _sizes(values["files"])),
        ],
        title=f"BitFit delta {printable(values['name'])}",
    )
    tables: list[str] = [summary, "", _term_table(values)]
    if values["metrics"]:
        rows = [(m["dataset"], m["split"], m["metric"], _number(m["value"])) for m in values["metrics"]]
        tables += ["", columns("Metrics", ["data set", "split", "metric", "value"], rows, left=3)]
    if values["largest_changes"]:
        changes = [(_name(r), r["layer"], _number(r["value"])) for r in values["largest_changes"]]
        tables += ["", columns("Largest changes (mean |δ|)", ["term", "layer", "change"], changes)]
    return tables


def base_tables(values: dict[str, Any]) -> list[str]:
    """The result of `bitfit inspect` on a base model."""
    counts = values["parameters"]
    head = "not known for this class; name it in `modules_to_save`" if values["head"] is None else None
    missing = f"{values['missing_biases']:,} layers (add_missing_biases=True)" if values["missing_biases"] else None
    summary = facts(
        [
            ("model class", values["model_class"]),
            ("parameters", f"{counts['base']:,} without head"),
            ("bias parameters", f"{counts['biases']:,}{_share(counts)}"),
            ("could be added in", missing),
            ("head", head or _listed(values["head"]) or "none"),
            ("head parameters", f"{counts['head']:,}" if counts["head"] else None),
            ("not selected", _listed(values["unknown_vectors"])),
        ],
        title=f"Base model {printable(values['name'])}",
    )
    return [summary, "", _term_table(values)]


def result_table(values: dict[str, Any]) -> list[str]:
    """The result of a command that writes something."""
    return [
        facts(
            (name.replace("_", " "), _listed(value) if isinstance(value, list) else value)
            for name, value in values.items()
        )
    ]


def diff_tables(values: dict[str, Any]) -> list[str]:
    """The result of `bitfit diff`."""
    head = values["head"]
    if head["comparable"]:
        heads = "equal" if head["distance"] == 0 else f"distance {_number(head['distance'])}"
    else:
        heads = "of different shape" if head["a"] and head["b"] else "only in " + ("A" if head["a"] else "B")
    summary = facts(
        [
            ("A", _one(values["a"])),
            ("B", _one(values["b"])),
            ("same base", "yes" if values["same_base"] else "no: what follows compares deltas of different models"),
            ("head", heads if head["a"] or head["b"] else None),
        ]
    )
    rows = [(_name(r), r["layer"], *_measures(r)) for r in values["rows"]]
    rows.append(("all", None, *_measures(values["total"])))
    names = ["term", "layer", "distance", "cosine", "size"]
    tables: list[str] = [summary, "", columns("Distance (mean |δ_A − δ_B|)", names, rows)]
    for label in ("a", "b"):
        alone = [f"{r['tensor']} ({r['term']})" for r in values["only_one"] if r["delta"] == label]
        if alone:
            tables += ["", facts([(f"only in {label.upper()}", f"{len(alone):,} tensors: {_listed(alone)}")])]
    return tables


def _term_table(values: dict[str, Any]) -> str:
    rows = [(_name(row), f"{row['tensors']:,}", f"{row['parameters']:,}") for row in values["terms"]]
    return columns("Bias terms", ["term", "tensors", "parameters"], rows)


def _name(row: dict[str, Any]) -> str:
    name = row["term"] if row["symbol"] == row["term"] else f"{row['term']} ({row['symbol']})"
    return f"{row['stack']} {name}" if row.get("stack") else name


def _measures(row: dict[str, Any]) -> tuple[str | None, str | None, str]:
    cosine = None if row["cosine"] is None else f"{row['cosine']:.4f}"
    return None if row["distance"] is None else _number(row["distance"]), cosine, f"{row['size']:,}"


def _one(summary: dict[str, Any]) -> str:
    revision = f" at {summary['revision'][:12]}" if summary["revision"] else ""
    return f"{summary['biases']:,} biases, head of {summary['head']:,}, base {summary['base_model']}{revision}"


def _share(counts: dict[str, Any]) -> str:
    percent = counts["biases_percent_of_base"]
    return "" if percent is None else f" ({percent:.3f} % of the base)"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sizes(files: dict[str, int]) -> str:
    """Files with their sizes, all in one unit."""
    unit, name = (1e6, "MB") if max(files.values(), default=0) >= 1e7 else (1e3, "kB")
    return _listed(f"{file} {size / unit:,.1f} {name}" for file, size in files.items())


def _listed(items: Iterable[str]) -> str:
    entries = list(items)
    return ", ".join(entries[:_SHOWN]) + (f" and {len(entries) - _SHOWN:,} more" if len(entries) > _SHOWN else "")
