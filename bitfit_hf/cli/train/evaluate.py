"""How good a delta is on a table: what `bitfit eval` does."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, Trainer

from ...delta.value import BiasDelta
from ...errors import CheckpointError, OutputError
from ...storage.files import write_bytes
from ...storage.fingerprint import base_mismatch
from ...tables.columns import Columns, find_columns
from ...tables.encoding import IGNORED, encode, longest_input
from ...tables.examples import Examples, complete_rows, to_examples
from ...tables.metrics import Answers, constant_answer, constant_scores, label_scores, main_metric, scores
from ...tables.problem import WORDS, Kind, Problem, number
from ...tables.reading import Source, read_one
from ...tables.table import Table
from ..checkpoints import is_local, preprocessing_folder
from ..deltas import base_revision, load_base, read_delta
from ..tables import columns as column_table
from ..text import wrapped
from .base import load_tokenizer
from .progress import Narrator
from .report import EVALUATION_FILE, system_rows
from .run import accelerator, collator, is_first, processes, shrink, trainer_arguments


@dataclass(frozen=True)
class EvalWanted:
    """
    What the user says of the evaluation.

    Args:
        source ([`Source`]): The table.
        split (`str`, *optional*): Of a folder or a data set.
        text (`str`, *optional*), text2 (`str`, *optional*), labels (`tuple[str, ...]`): Columns.
        label_separator (`str`, *optional*): Between several labels in one cell.
        skip_incomplete (`bool`): Leaves out rows without a text or a label.
        max_length (`int`, *optional*): In tokens.
        base (`str`, *optional*), base_revision (`str`, *optional*): Of the base, if not the one that the delta names.
        delta_revision (`str`, *optional*): Of the delta's repo.
        on_base_mismatch (`str`): What to do with a delta of another checkpoint.
        predictions (`Path`, *optional*): A CSV file to write, with a row for each text.
    """

    source: Source
    split: str | None = None
    text: str | None = None
    text2: str | None = None
    labels: tuple[str, ...] = ()
    label_separator: str | None = None
    skip_incomplete: bool = False
    max_length: int | None = None
    base: str | None = None
    base_revision: str | None = None
    delta_revision: str | None = None
    on_base_mismatch: Any = "raise"
    predictions: Path | None = None


def evaluate(name: str, wanted: EvalWanted, *, token: str | None, quiet: bool) -> dict[str, Any] | None:
    """Evaluates a delta.

    Args:
        name (`str`): Folder or repo of the delta.
        wanted ([`EvalWanted`]): On what.
        token (`str`, *optional*): For private repos.
        quiet (`bool`): Says nothing meanwhile.

    Returns:
        `dict[str, Any]`: The figures; `None` in all processes but the first.

    Raises:
        [`BitFitError`]: The table does not fit the delta, or one of the two cannot be used.
    """
    narrator = Narrator(silent=quiet or not is_first())
    if wanted.predictions is not None and wanted.predictions.is_dir():
        raise OutputError(f"{wanted.predictions} is a folder; pass the file to write.")
    delta, folder = read_delta(name, wanted.delta_revision, token)
    problem = problem_of(delta, name)
    remembered = _remembered(folder)
    table = read_one(wanted.source, split=wanted.split)
    columns = _columns(table, wanted, remembered)
    if problem.kind is Kind.MULTI_LABEL:
        problem = Problem(problem.kind, problem.labels, wanted.label_separator or remembered.get("label_separator"))
    table, skipped = complete_rows(table, columns, kind=problem.kind, skip=wanted.skip_incomplete)
    examples = to_examples(_with_label_names(table, columns, problem), columns, problem)

    base = wanted.base or delta.config.base_model_name_or_path
    if base is None:
        raise CheckpointError(f"{name} does not name its base; pass --base.")
    model = load_base(base, delta, wanted.base_revision, None, token)
    tokenizer = _tokenizer(name, folder, base, base_revision(base, delta, wanted.base_revision), token)
    with base_mismatch(wanted.on_base_mismatch):
        delta.apply_(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    length = longest_input(tokenizer, model.config, wanted.max_length or remembered.get("max_length"))
    encoded = encode(examples, problem, tokenizer, length)
    narrator.plan(
        [
            ("Delta", f"{name}: {WORDS[problem.kind]}, {len(problem.labels) or 'no'} labels"),
            ("Table", f"{table.name}: {len(table):,} rows" + (f", {skipped:,} left out" if skipped else "")),
            ("Device", f"{processes()} × {'accelerator' if accelerator() else 'CPU'}"),
        ],
        _notes(encoded.cut, length, table, remembered),
    )
    answers = _predict(model, encoded, problem, tokenizer)
    if not is_first():
        return None
    if wanted.predictions is not None:
        _write_predictions(wanted.predictions, examples, columns, problem, answers)
    answer = constant_answer(problem, examples.labels)
    return {
        "delta": name,
        "table": table.name,
        "task": problem.kind.value,
        "metric": main_metric(problem),
        "systems": {
            "constant": constant_scores(problem, answer, answers.right, encoded.lost_words),
            "bitfit": scores(problem, answers),
        },
        "constant_answer": problem.labels[answer] if problem.kind is Kind.CLASSIFICATION else None,
        "labels": label_scores(problem, answers),
        "rows": {"evaluation": len(examples), "skipped": skipped},
        "predictions": None if wanted.predictions is None else str(wanted.predictions),
    }


def _notes(cut: int, length: int, table: Table, remembered: dict[str, Any]) -> list[str]:
    found = [f"{cut:,} texts are longer than {length} tokens and are cut."] if cut else []
    if remembered.get("table") == table.name:
        found.append(
            f"The delta was trained on a table of the name {table.name}. Rows that were trained on flatter the model."
        )
    return found


def problem_of(delta: BiasDelta, name: str) -> Problem:
    """The task of a delta, from its configuration.

    Raises:
        [`CheckpointError`]: It is none that has a table of labelled texts.
    """
    config = delta.config
    labels = tuple((config.id2label or {})[index] for index in sorted(config.id2label or {}))
    cls = str((config.auto_mapping or {}).get("base_model_class", ""))
    if config.task_type == "TOKEN_CLS" or cls.endswith("ForTokenClassification"):
        return Problem(Kind.TOKENS, labels)
    if config.task_type != "SEQ_CLS" and not cls.endswith("ForSequenceClassification"):
        raise CheckpointError(
            f"{name} is a delta for {config.task_type or cls or 'an unknown task'}; `bitfit eval` is for "
            "classifiers of texts and words."
        )
    if config.num_labels == 1 or config.problem_type == "regression":
        return Problem(Kind.REGRESSION)
    if config.problem_type == "multi_label_classification":
        return Problem(Kind.MULTI_LABEL, labels)
    return Problem(Kind.CLASSIFICATION, labels)


def _remembered(folder: Path) -> dict[str, Any]:
    """What `bitfit train` has written down about the table; nothing for a delta of other origin."""
    try:
        found = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _columns(table: Table, wanted: EvalWanted, remembered: dict[str, Any]) -> Columns:
    """The columns: as the user says, as they were in training where the table has those, or found by their names."""

    def known(value: Any) -> str | None:
        return value if isinstance(value, str) and value in table.columns else None

    text, text2, labels = wanted.text, wanted.text2, wanted.labels
    if text is None and text2 is None:
        text = known(remembered.get("text"))
        text2 = known(remembered.get("text2")) if text is not None else None
    names = remembered.get("labels")
    if not labels and isinstance(names, list) and names and all(known(name) for name in names):
        labels = tuple(names)
    return find_columns(table, text=text, text2=text2, labels=labels)


def _with_label_names(table: Table, columns: Columns, problem: Problem) -> Table:
    """The table, with the delta's label names for a column that holds ids instead of names."""
    (column, *more) = columns.labels
    if more or problem.kind not in (Kind.CLASSIFICATION, Kind.TOKENS) or column in table.label_names:
        return table
    ids = {str(index) for index in range(len(problem.labels))}
    if ids & set(problem.labels):
        return table  # the names are numbers themselves

    def is_id(entry: Any) -> bool:
        found = number(entry)
        return found is not None and f"{found:g}" in ids

    cells = [row.get(column) for row in table.rows]
    entries = [entry for cell in cells for entry in (cell if isinstance(cell, list) else [cell])]
    if 2 * sum(map(is_id, entries)) <= len(entries):
        return table

    def as_id(cell: Any) -> Any:
        if isinstance(cell, list):
            return [as_id(entry) for entry in cell]
        return int(float(cell)) if is_id(cell) else cell  # what is none is told with its row

    rows = [{**row, column: as_id(row[column])} for row in table.rows]
    return replace(table, rows=rows, label_names={**table.label_names, column: list(problem.labels)})


def _tokenizer(name: str, folder: Path, base: str, revision: str | None, token: str | None) -> PreTrainedTokenizerBase:
    """The delta's own tokenizer where it has one, for added tokens; else the base's."""
    own = preprocessing_folder(name, revision=folder.name, token=token) if not is_local(name) else folder
    source = str(own) if (own / "tokenizer_config.json").is_file() else base
    return load_tokenizer(source, revision=revision if source == base else None, token=token)


def _predict(model: Any, encoded: Any, problem: Problem, tokenizer: PreTrainedTokenizerBase) -> Answers:
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            trainer_arguments(scratch),
            data_collator=collator(problem, tokenizer),
            preprocess_logits_for_metrics=shrink(problem),
        )
        found = trainer.predict(encoded.rows)
    return Answers(np.asarray(found.label_ids), np.asarray(found.predictions), encoded.lost_words)


def _write_predictions(path: Path, examples: Examples, columns: Columns, problem: Problem, answers: Answers) -> None:
    """A CSV file with texts, right answers and predictions, in the table's order."""

    def shown(value: Any, right: Any) -> str:
        if problem.kind is Kind.REGRESSION:
            return f"{float(value):.6g}"
        if problem.kind is Kind.CLASSIFICATION:
            return problem.labels[int(value)]
        if problem.kind is Kind.MULTI_LABEL:
            return (problem.separator or "|").join(n for n, yes in zip(problem.labels, value) if yes)
        return " ".join(problem.labels[int(tag)] for tag, mark in zip(value, right) if mark != IGNORED)

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*columns.texts, "label", "prediction"])
    for texts, right, given in zip(examples.texts, answers.right, answers.given):
        cells = [" ".join(texts)] if problem.kind is Kind.TOKENS else list(texts)
        writer.writerow([*cells, shown(right, right), shown(given, right)])
    try:
        write_bytes(path, text.getvalue().encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def show(values: dict[str, Any]) -> list[str]:
    """The figures for people."""
    names, rows = system_rows(values)
    shown: list[str] = [
        column_table(f"{values['delta']} on {values['rows']['evaluation']:,} rows of {values['table']}", names, rows)
    ]
    if values["labels"]:
        cells = [
            (entry["label"], *(f"{entry[name]:.3f}" for name in ("precision", "recall", "f1")), f"{entry['count']:,}")
            for entry in values["labels"]
        ]
        unit = "words" if values["task"] == Kind.TOKENS.value else "rows"
        shown += ["", column_table("By label", ["label", "precision", "recall", "F1", unit], cells)]
    if values["predictions"]:
        shown += ["", wrapped(f"Predictions are in {values['predictions']}.")]
    return shown
