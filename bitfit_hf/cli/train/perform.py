"""From options to files: the order of events in `bitfit train`."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...card.model_card import write_card
from ...config import BitFitConfig
from ...errors import MissingDependencyError, OutputError
from ...hub.contents import draw_change
from ...tables.encoding import longest_input
from ...trainer import recommended_learning_rate
from ..checkpoints import check_output, new_folder
from ..tables import columns
from ..text import wrapped
from .base import read_base
from .data import Wanted, read_task
from .plan import Plan
from .progress import Narrator
from .report import evaluation, next_steps, remarks, system_rows, write_evaluation
from .run import Run, is_first, processes
from .settings import Settings


@dataclass(frozen=True)
class Output:
    """
    Where the delta goes and what is printed.

    Args:
        folder (`Path`): The delta's folder.
        force (`bool`): Replaces the delta that is there.
        dry_run (`bool`): Says what would happen, and no more.
        quiet (`bool`): Says nothing meanwhile.
        card (`dict[str, Any]`): Facts for the card that only people know.
    """

    folder: Path
    force: bool = False
    dry_run: bool = False
    quiet: bool = False
    card: dict[str, Any] | None = None


def perform(
    wanted: Wanted, base_name: str, settings: Settings, output: Output, *, revision: str | None, token: str | None
) -> dict[str, Any] | None:
    """Trains on a table.

    Args:
        wanted ([`Wanted`]): The table.
        base_name (`str`): Folder or repo of the base.
        settings ([`Settings`]): How to train.
        output ([`Output`]): Where to.
        revision (`str`, *optional*): Of the base.
        token (`str`, *optional*): For private repos.

    Returns:
        `dict[str, Any]`: The plan of a dry run; else the evaluation and the folder. `None` in all processes but the
        first.

    Raises:
        [`BitFitError`]: The table, the base, the output or an option cannot be used.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise MissingDependencyError(
            "Metrics are computed with scikit-learn, which is not installed: pip install 'bitfit-hf[train]'."
        )
    config = BitFitConfig(bias_terms=list(settings.terms) or "all", add_missing_biases=settings.add_missing_biases)
    folder = check_output(output.folder, force=output.force)
    if settings.batch_size % processes():
        raise OutputError(f"--batch-size {settings.batch_size} cannot be split evenly over {processes()} processes.")
    narrator = Narrator(silent=output.quiet or not is_first())
    _let_libraries_warn(only=is_first())
    task = read_task(wanted, eval_share=settings.eval_share, seed=settings.seed)
    base = read_base(base_name, task.problem, revision=revision, token=token)
    if settings.learning_rate is None:
        settings = replace(settings, learning_rate=recommended_learning_rate(base.config))
    length = longest_input(base.tokenizer, base.config, settings.max_length)
    run = Run(task, base, settings, config, output.card or {}, _scratch(folder), narrator, length)
    plan = Plan(task, base, settings, length, run.train.cut, str(output.folder))
    narrator.plan(plan.lines(), plan.warnings())
    if output.dry_run:
        return {"dry_run": True, **plan.values()} if is_first() else None

    try:
        tuned = run.bitfit()
        values = evaluation(run, tuned, None)
        if is_first():
            _publish(run, folder, output, values)  # whatever becomes of the comparison, the delta is there
        if settings.baseline and not tuned.interrupted:
            values = evaluation(run, tuned, run.frozen())
            if is_first():
                write_evaluation(folder, values)
    finally:
        run.clean_up()
    if not is_first():
        return None
    return {"output": str(output.folder), **values, "next": next_steps(run, output.folder)}


def _publish(run: Run, folder: Path, output: Output, values: dict[str, Any]) -> None:
    """Puts the delta in its place, in one step, with picture, card and figures."""
    from ...delta.value import BiasDelta

    with new_folder(folder, force=output.force) as fresh:
        for path in sorted(run.saved.iterdir()):
            if path.name != "training_args.bin":  # a pickle, of no use without the rows
                os.replace(path, fresh / path.name)
        delta = BiasDelta.from_folder(fresh)
        draw_change(delta, fresh)
        write_card(fresh, delta=delta)  # once more, now that there is a picture
        write_evaluation(fresh, values)


def _scratch(folder: Path) -> Path:
    """A folder beside the output, of one name in all processes of a launch and in no other launch."""
    name = os.environ.get("MASTER_PORT") if processes() > 1 else None
    return folder.parent / f".{folder.name}.{name or secrets.token_hex(4)}.training"


def _let_libraries_warn(*, only: bool) -> None:
    """Warnings of the callback are for the user, once: from the first process."""
    if not only:
        logging.getLogger("bitfit_hf").setLevel(logging.ERROR)


def show(values: dict[str, Any]) -> list[str]:
    """The result of a training for people."""
    if "dry_run" in values:
        return ["Nothing has been trained or written."]
    names, rows = system_rows(values)
    trained = values["parameters"]
    title = f"Evaluated on {values['rows']['evaluation']:,} rows that were not trained on"
    return [
        "",
        columns(title, names, rows),
        "",
        *(wrapped(line) for line in remarks(values)),
        "",
        wrapped(
            f"The delta is in {values['output']}: {trained['biases']:,} biases and a head of {trained['head']:,}."
        ),
        "",
        *values["next"],
    ]
