"""What is going to happen, in words: the first lines of `bitfit train`, and all that `--dry-run` shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...tables.metrics import main_metric
from ...tables.problem import WORDS, Kind
from ...terms import find_biases, head_modules, part_tensors, pooler_modules
from ...tuner.plan import num_base_parameters
from .base import Base
from .data import Task, balance
from .progress import short
from .settings import Settings

_SHOWN = 8  # labels with their share
_RARE = 10  # rows of a label to train on, below which a word is in place


@dataclass(frozen=True)
class Plan:
    """
    A training before it begins.

    Args:
        task ([`Task`]): The rows.
        base ([`Base`]): The base.
        settings ([`Settings`]): How to train.
        max_length (`int`): In tokens.
        cut (`int`): Texts that are longer.
        output (`str`): Where the delta goes.
    """

    task: Task
    base: Base
    settings: Settings
    max_length: int
    cut: int
    output: str

    def values(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        task, settings = self.task, self.settings
        rows = len(task.train)
        model = self.base.without_weights()
        heads = head_modules(model)
        return {
            "table": task.name,
            "columns": {"text": task.columns.text, "text2": task.columns.text2, "labels": list(task.columns.labels)},
            "task": task.problem.kind.value,
            "labels": list(task.problem.labels),
            "counts": dict(balance(task.problem, task.train)),
            "rows": {"train": rows, "evaluation": len(task.evaluation), "skipped": task.skipped},
            "split": task.split,
            "base": self.base.public_name,
            "model_class": type(model).__name__,
            "parameters": {
                "base": num_base_parameters(model, heads),
                "biases": sum(bias.num_parameters for bias in find_biases(model)),
                "head": sum(tensor.numel() for tensor in part_tensors(model, heads).values()),
            },
            "poolers": pooler_modules(model),
            "max_length": self.max_length,
            "longer_texts": self.cut,
            "learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
            "epochs": settings.planned_epochs(rows),
            "updates": settings.planned_updates(rows),
            "metric": main_metric(task.problem),
            "output": self.output,
        }

    def lines(self) -> list[tuple[str, str]]:
        """The plan for people: a word, and what it says."""
        values, settings = self.values(), self.settings
        counts, rows = values["parameters"], values["rows"]
        skipped = f" ({rows['skipped']:,} more lack a text or a label and are left out)" if rows["skipped"] else ""
        stop = (
            f"; ends after {settings.patience} evaluations without a better {short(values['metric'])}"
            if settings.patience
            else ""
        )
        cut = f", {self.cut:,} are longer and are cut" if self.cut else ""
        pooler = "; of the pooler the weight too, if the base has never trained it" if values["poolers"] else ""
        made = [
            ("Table", f"{values['table']}: {self._texts()}, {self._labels()}{skipped}"),
            ("Task", f"{WORDS[self.task.problem.kind]}{self._balance()}"),
            ("Split", f"{rows['train']:,} rows to train on, {rows['evaluation']:,} to evaluate on: {values['split']}"),
            (
                "Base",
                f"{values['base']}, {counts['base'] / 1e6:.1f} million parameters; texts of up to {self.max_length} "
                f"tokens{cut}",
            ),
            (
                "Trains",
                f"{counts['biases']:,} biases ({100 * counts['biases'] / max(counts['base'], 1):.2f} % of the base) "
                f"and a new head of {counts['head']:,} parameters{pooler}",
            ),
            (
                "Updates",
                f"up to {values['updates']:,}, {values['epochs']:g} epochs of batches of {values['batch_size']}, "
                f"learning rate {values['learning_rate']:g}{stop}",
            ),
            ("Writes", self.output),
        ]
        return made

    def warnings(self) -> list[str]:
        """What may make the result a bad one."""
        task = self.task
        found = []
        if task.shared:
            found.append(
                f"{task.shared:,} of the {len(task.evaluation):,} rows to evaluate on have a text that is trained on "
                "too, so the figures will flatter the model."
            )
        rare = [(name, count) for name, count in balance(task.problem, task.train) if count < _RARE]
        if task.problem.kind is Kind.CLASSIFICATION and rare:
            name, count = rare[-1]
            found.append(
                f'{len(rare)} of the labels have fewer than {_RARE} rows to train on ("{name}" has {count}); they '
                "will hardly be learned."
            )
        if not self.settings.epochs and len(task.train) < 50:
            found.append(f"{len(task.train)} rows are few to learn from; a hundred for each label are a good start.")
        return found

    def _texts(self) -> str:
        pair = " and ".join(f'"{column}"' for column in self.task.columns.texts)
        return f"texts in {pair}"

    def _labels(self) -> str:
        return f"labels in {', '.join(f'{chr(34)}{name}{chr(34)}' for name in self.task.columns.labels[:_SHOWN])}"

    def _balance(self) -> str:
        if self.task.problem.kind is Kind.REGRESSION:
            values = self.task.train.labels
            return f", values from {min(values):g} to {max(values):g}, {sum(values) / len(values):.3g} on average"
        counts = balance(self.task.problem, self.task.train)
        total = len(self.task.train)
        if self.task.problem.kind is Kind.TOKENS:
            total = sum(map(len, self.task.train.labels))
        shares = ", ".join(f"{name} {_percent(count, total)}" for name, count in counts[:_SHOWN])
        more = f" and {len(counts) - _SHOWN:,} more" if len(counts) > _SHOWN else ""
        return f", {len(self.task.problem.labels)} labels: {shares}{more}"


def _percent(count: int, total: int) -> str:
    share = 100 * count / max(total, 1)
    return f"{share:.0f} %" if share >= 1 else f"{math.ceil(share * 10) / 10:.1f} %"
