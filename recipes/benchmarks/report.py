"""The results as JSON, one file per shape and device, and all of them as Markdown and a plot."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitfit_hf.storage.files import write_bytes

from .systems import FULL, REFERENCE, SYSTEMS

FORMAT = 1
MARKDOWN, PLOT = "training.md", "training.png"


def write_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """Writes the result of one shape, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"training-{result['shape']}-{result['device']}.json"
    write_bytes(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return path


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, in the order of their names."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("training-*.json"))]
    wrong = [result["shape"] for result in found if result.get("format") != FORMAT]
    if wrong:
        raise ValueError(f"The results of {wrong} are of another format; measure them again with --overwrite.")
    return found


def render(folder: Path) -> list[Path]:
    """Writes the Markdown and the plot of all results in a folder."""
    results = read_results(folder)
    if not results:
        raise FileNotFoundError(f"There are no results in {folder}.")
    write_bytes(folder / MARKDOWN, markdown(results).encode())
    write_bytes(folder / PLOT, _plot(results))
    return [folder / MARKDOWN, folder / PLOT]


# --- Markdown --------------------------------------------------------------------------------------------------------

_INTRODUCTION = f"""# What a training step costs

Made by `recipes/benchmarks/training.py` from the JSON files beside this page; do not edit. All systems take their
steps in turn, round after round. *Time* is the median over the rounds of a system's step time divided by that of
*{REFERENCE}* in the same round; ± is half the distance between the quartiles, and differences below it are noise.
*Kept* is what the forward pass leaves in memory for the backward pass. *Peak* is the most memory that a step takes,
weights included: of a GPU's allocator, or on a CPU of a process of its own. *Sent* is what data-parallel training
exchanges per step: the gradients. *Load* puts a task from disk onto a base that is in memory, *switch* changes between
two tasks in memory.
"""

_COLUMNS = (
    *("system", "trainable", "step", "time", "±", "kept", "kept / full", "peak", "optimizer", "sent", "disk", "save"),
    *("load", "switch"),
)


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """All results as a page with one table each."""
    parts = [_INTRODUCTION, f"![Step time and kept activations]({PLOT})\n"]
    for result in results:
        rows = [_COLUMNS, ["---"] + ["---:"] * (len(_COLUMNS) - 1), *(_cells(row, result) for row in result["rows"])]
        parts += [f"## {_title(result)}\n", _provenance(result)]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")
    return "\n".join(parts)


def _cells(row: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    full = next((other["kept_bytes"] for other in result["rows"] if other["system"] == FULL), None)
    return [
        row["system"],
        f"{row['trainable']:,}",
        seconds(row["seconds"]),
        f"{row['ratio']:.3f}",
        f"{row['spread']:.3f}",
        size(row["kept_bytes"]),
        "" if not full else f"{row['kept_bytes'] / full:.2f}",
        size(row["peak_bytes"]),
        size(row["optimizer_bytes"]),
        size(row["gradient_bytes"]),
        size(row["disk_bytes"]),
        *(seconds(row[f"{action}_seconds"]) for action in ("save", "load", "switch")),
    ]


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['shape']} on {result['hardware']['device']}"


def _provenance(result: Mapping[str, Any]) -> str:
    shape, hardware = result["model"], result["hardware"]
    packages = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers", "peft"))
    commit = (result["commit"] or "unknown")[:12] + (" with changes" if result["dirty"] else "")
    return (
        f"{shape['layers']} layers x {shape['hidden_size']}, MLP {shape['intermediate_size']}, batch "
        f"{shape['batch_size']} x {shape['length']}, {result['rounds']} rounds; {hardware['cpu']}, "
        f"{hardware['threads']} threads; {packages}; commit {commit}.\n"
    )


def size(number: float | None) -> str:
    """Bytes for people."""
    if number is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024 or unit == "MiB":
            break
        number /= 1024
    return f"{number:,.0f} {unit}" if number >= 10 or number == 0 else f"{number:.2g} {unit}"


def seconds(number: float | None) -> str:
    """Seconds for people."""
    if number is None:
        return ""
    if number < 1e-3:
        return f"{1e6 * number:.0f} µs"
    return f"{1e3 * number:.3g} ms" if number < 1 else f"{number:.2f} s"


# --- plot ------------------------------------------------------------------------------------------------------------


def _plot(results: Sequence[Mapping[str, Any]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 3.2 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(results), 2, squeeze=False)
    order = list(SYSTEMS)
    for (left, right), result in zip(axes, results, strict=True):
        rows = sorted(result["rows"], key=lambda row: order.index(row["system"]), reverse=True)
        names = [row["system"] for row in rows]
        colors = ["#1f5fa8" if name.startswith("BitFit") else "#b8b8b8" for name in names]
        left.barh(names, [row["ratio"] for row in rows], xerr=[row["spread"] for row in rows], color=colors)
        left.axvline(1.0, color="black", linewidth=0.8)
        left.set_xlabel(f"step time / {REFERENCE}")
        left.set_title(_title(result))
        right.barh(names, [row["kept_bytes"] / 2**20 for row in rows], color=colors)
        right.set_xlabel("kept for the backward pass (MiB)")
        right.tick_params(labelleft=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
