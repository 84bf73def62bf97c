"""What all outputs share: Markdown tables, how figures are written, and the notes on how they came about."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .aggregate import Summary, missing_runs
from .paper import MARK, NOTE, PaperFigure
from .plan import Cell
from .store import RunStore, StoredRun
from .studies import StudyConfig

INCOMPLETE = "\\*"


@dataclass(frozen=True)
class Context:
    """
    What every output is made from.

    Args:
        config ([`StudyConfig`]): The studies.
        store ([`RunStore`]): The finished runs.
        config_option (`str`): The study config as `--config` names it.
        local_data (`bool`): Whether the runs read local data.
    """

    config: StudyConfig
    store: RunStore
    config_option: str
    local_data: bool = False

    @property
    def score(self) -> str:
        """Which dev score counts: `"best"` or `"final"`."""
        return self.config.score

    def command(self, study: str) -> str:
        """What continues a study; the folder of local data is left to the reader, as paths are not kept."""
        kind = "table" if study.startswith("table") else "figure" if study.startswith("figure") else "study"
        words = [
            "python",
            "recipes/reproduction/reproduce.py",
            f"--{kind}",
            study.removeprefix(kind),
            "--config",
            self.config_option,
        ]
        return shlex.join(words) + (' --data_dir "$DATA_DIR"' if self.local_data else "")


def table(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first row is its head, the first `left` columns are flush left."""
    head, *body = [list(row) for row in rows]
    rule = [":--" if index < left else "--:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def percent(value: float) -> str:
    """A metric from 0 to 1 as the paper writes it."""
    return "diverged" if math.isnan(value) else f"{100 * value:.1f}"


def figure(summary: Summary) -> str:
    """One figure of ours: mean ± deviation, number of seeds, and what is missing."""
    if not summary.values:
        return f"– (0/{summary.wanted} runs)"
    text = percent(summary.mean)
    if summary.std is not None:
        text += f" ± {100 * summary.std:.1f}"
    assert summary.choice is not None
    if not summary.choice.complete:
        text += INCOMPLETE
    seeds = f"n={len(summary.values)}"
    return f"{text} ({seeds})" if summary.complete else f"{text} ({seeds}, {summary.done}/{summary.wanted} runs)"


def paper_figure(value: PaperFigure | None) -> str:
    """One figure of the paper, marked where it was not checked."""
    return "" if value is None else str(value)


def how(context: Context, cells: Sequence[Cell]) -> list[str]:
    """How the figures were chosen and averaged: what a reader must know to judge them."""
    seeds = (
        "The learning rate was chosen with the first seed, and further seeds were run at that rate only."
        if context.config.seeds_at_best
        else "Every learning rate was run with every seed, and the one with the best mean was chosen."
    )
    epoch = "of the best epoch" if context.score == "best" else "after the last epoch"
    apart = {cell.task.dev_halves for cell in cells}
    halves = (
        "one half of the dev set is for choosing the learning rate and the epoch, and the scores are of the other half"
    )
    whole = (
        "as in the paper, the learning rate is chosen on the dev set that is reported, so the figures are optimistic, "
        "for every method alike"
    )
    if len(apart) == 2:
        names = ", ".join(dict.fromkeys(cell.task.name for cell in cells if not cell.task.dev_halves))
        chosen = f"{halves}; of {names} {whole}"
    else:
        chosen = halves if apart == {True} else whole
    lines = [
        f"Scores are on the dev set, {epoch}, times 100: {chosen}. {seeds} ± is the sample standard deviation over n "
        "seeds; without it there is one seed, and differences of a point or two may be chance."
    ]
    if any(cell.method.name == "bitfit" for cell in cells):
        lines.append(
            "BitFit is the paper's, with one learning rate for all terms; BitFit by default is what the library does "
            "when nothing is set, at the one learning rate that it recommends."
        )
    if any(cell.task.train_rows != cell.task.rows for cell in cells):
        sizes = {
            f"{cell.task.name}: {cell.task.train_rows:,} of {cell.task.rows:,} rows"
            for cell in cells
            if cell.task.rows and cell.task.train_rows != cell.task.rows
        }
        lines.append(f"Trained on a part of the training set, drawn by the seed: {'; '.join(sorted(sizes))}.")
    if context.config.about:
        lines.insert(0, context.config.about)
    return lines


def missing(context: Context, study: str, cells: Sequence[Cell]) -> list[str]:
    """What is missing, and the command that goes on."""
    wanted = sum(cell.size for cell in cells)
    left = []
    for cell in cells:
        now, later = missing_runs(cell, context.store, context.score)
        if now or later:
            left.append((cell, len(now) + later))
    count = sum(number for _, number in left)
    if not count:
        return ["## Missing", "", f"Nothing: all {wanted} runs are there."]
    lines = ["## Missing", "", f"{count} of {wanted} runs. This goes on where it stopped:", ""]
    lines += ["```bash", context.command(study), "```", ""]
    by_task: dict[tuple[str, str], list[str]] = {}
    for cell, number in left:
        by_task.setdefault((cell.model.name, cell.task.name), []).append(f"{cell.method.name} {number}/{cell.size}")
    return lines + [f"- {model}, {task}: {', '.join(entries)}" for (model, task), entries in by_task.items()]


def finished_runs(context: Context, cells: Iterable[Cell]) -> list[StoredRun]:
    """Every finished run of some cells."""
    found = [context.store.get(run) for cell in cells for run in cell.possible()]
    return [stored for stored in found if stored is not None]


def provenance(context: Context, cells: Iterable[Cell]) -> list[str]:
    """What the runs were made with: commits, packages, hardware."""
    runs = finished_runs(context, cells)
    if not runs:
        return []
    records = [stored.record for stored in runs]

    def listed(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    commits = listed(
        f"{str(record.get('commit') or 'unknown')[:12]}{' (with uncommitted changes)' if record.get('dirty') else ''}"
        for record in records
    )
    machines = {
        ", ".join(f"{name} {value}" for name, value in sorted((record.get("hardware") or {}).items()))
        for record in records
    }
    packages = sorted({name for record in records for name in record.get("versions") or {}})
    versions = "; ".join(
        f"{name} {listed(str(record['versions'][name]) for record in records if name in record.get('versions', {}))}"
        for name in packages
    )
    hours = sum(stored.wall_seconds for stored in runs) / 3600
    return [
        "## Provenance",
        "",
        f"- {len(runs)} runs, {hours:.1f} hours in all; one JSON each in `runs/`",
        f"- commit: {commits}",
        f"- versions: {versions}",
        f"- hardware: {'; '.join(sorted(machines))}",
    ]


def marks(text: str) -> list[str]:
    """The notes on those marks that occur in a text."""
    notes = []
    if MARK in text:
        notes.append(NOTE)
    if INCOMPLETE in text:
        notes.append(f"{INCOMPLETE} Not every learning rate of the grid has been tried yet.")
    return [line for note in notes for line in (note, "")]


def document(title: str, context: Context, study: str | None, cells: Sequence[Cell], body: Sequence[str]) -> str:
    """A whole output: title, how it was made, the body, the notes on its marks, what is missing, provenance.

    What is missing is left out without a `study` that a command could go on with.
    """
    text = "\n".join(body)
    lines = [f"# {title}", ""]
    for paragraph in how(context, cells):
        lines += [paragraph, ""]
    lines += [text, "", *marks(text)]
    if study is not None:
        lines += [*missing(context, study, cells), ""]
    lines += provenance(context, cells)
    return "\n".join(lines).rstrip() + "\n"
