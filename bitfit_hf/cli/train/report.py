"""How good the result is, and what to do with it: tables, `evaluation.json`, and the next commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ... import __version__
from ...storage.files import write_bytes
from ...tables.metrics import (
    LOWER_IS_BETTER,
    WORDS,
    constant_answer,
    constant_scores,
    label_scores,
)
from ...tables.problem import Kind
from .run import Outcome, Run

EVALUATION_FILE = "evaluation.json"


def evaluation(run: Run, tuned: Outcome, frozen: Outcome | None) -> dict[str, Any]:
    """Everything that the figures are about, ready for JSON: `evaluation.json` beside the delta.

    Args:
        run ([`Run`]): What was trained.
        tuned ([`Outcome`]): Of BitFit.
        frozen ([`Outcome`], *optional*): Of the head on a frozen body.
    """
    task, settings = run.task, run.settings
    assert tuned.answers is not None
    answer = constant_answer(run.problem, task.train.labels)
    constant = constant_scores(run.problem, answer, tuned.answers.right, run.evaluation.lost_words)
    return {
        "task": run.problem.kind.value,
        "metric": run.metric,
        "systems": {
            "constant": constant,
            **({} if frozen is None else {"frozen": frozen.scores}),
            "bitfit": tuned.scores,
        },
        "constant_answer": run.problem.labels[answer] if run.problem.kind is Kind.CLASSIFICATION else None,
        "labels": label_scores(run.problem, tuned.answers),
        "rows": {"train": len(task.train), "evaluation": len(task.evaluation), "skipped": task.skipped},
        "split": task.split,
        "data": {
            "table": task.name,
            "text": task.columns.text,
            "text2": task.columns.text2,
            "labels": list(task.columns.labels),
            "label_separator": run.problem.separator,
            "max_length": run.max_length,
        },
        "base": run.base.public_name,
        "training": {
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "epochs": tuned.epochs,
            "best_epoch": tuned.best_epoch,
            "updates": tuned.updates,
            "seconds": round(tuned.seconds, 1),
            "seed": settings.seed,
        },
        "parameters": {"biases": tuned.biases, "head": tuned.head, "base": tuned.base},
        "bitfit_version": __version__,
    }


def write_evaluation(folder: Path, values: dict[str, Any]) -> None:
    """Writes `evaluation.json` into a delta's folder."""
    write_bytes(folder / EVALUATION_FILE, json.dumps(values, indent=2, allow_nan=False).encode())


def system_rows(values: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table of the systems: names of its columns, and rows."""
    names = list(values["systems"]["bitfit"])
    constant = f'always "{values["constant_answer"]}"' if values["constant_answer"] else "always the same answer"
    if values["task"] == Kind.REGRESSION.value:
        constant = "always the mean"
    words = {"constant": constant, "frozen": "frozen body, head trained", "bitfit": "BitFit"}
    rows = [
        [words[system], *(f"{scores[name]:.3f}" for name in names)] for system, scores in values["systems"].items()
    ]
    return ["", *(WORDS[name] for name in names)], rows


def remarks(values: dict[str, Any]) -> list[str]:
    """What the figures do not say by themselves."""
    metric, systems = values["metric"], values["systems"]
    sign = -1 if metric in LOWER_IS_BETTER else 1
    tuned = sign * systems["bitfit"][metric]
    rows = values["rows"]["evaluation"]
    found = []
    if tuned <= sign * systems["constant"][metric]:
        found.append(
            "The model is no better than always giving the same answer: it has learned nothing. Try another "
            "--learning-rate (5e-4 or 3e-3), more --epochs or more rows."
        )
    elif "frozen" in systems and tuned <= sign * systems["frozen"][metric]:
        found.append(
            "Tuning the biases gained nothing over the head alone here. More rows, more --epochs or a --learning-rate "
            "of 3e-3 may change that."
        )
    accuracy = systems["bitfit"].get("accuracy")
    if accuracy is not None and values["task"] == Kind.CLASSIFICATION.value:
        error = math.sqrt(max(accuracy * (1 - accuracy), 0.25 / max(rows, 1)) / max(rows, 1))
        found.append(
            f"Of {rows:,} rows the standard error of the accuracy is {error:.3f}. The epoch was chosen on the same "
            "rows, so the figures flatter the model a little."
        )
    return found


def next_steps(run: Run, output: Path) -> list[str]:
    """How to load, evaluate, push and serve the delta: lines to copy."""
    name, folder = output.name, str(output)
    local = run.base.public_name != run.base.name
    base_name = " --base-model BASE-ON-THE-HUB" if local else ""
    example = run.task.evaluation.texts[0]
    text = " ".join(example) if run.problem.kind is Kind.TOKENS else example[0]
    shown = json.dumps(text if len(text) <= 50 else text[:47] + "...", ensure_ascii=False)
    pair = len(run.task.columns.texts) == 2
    call = f'{{"text": {shown}, "text_pair": "..."}}' if pair else shown
    top = ", top_k=None" if run.problem.kind is Kind.MULTI_LABEL else ""
    raw = ', function_to_apply="none"' if run.problem.kind is Kind.REGRESSION else ""
    return [
        "In Python:",
        "    import bitfit_hf",
        "    from transformers import pipeline",
        f'    task = pipeline("{run.base.pipeline_tag}", model={json.dumps(folder)})',
        f"    task({call}{top}{raw})",
        "On the command line:",
        f"    bitfit eval {folder} MORE.csv",
        f"    bitfit inspect {folder}",
        f"    bitfit push {folder} USER/{name}{base_name}",
        f"    bitfit serve {run.base.name} --task {name}={folder}",
    ]
