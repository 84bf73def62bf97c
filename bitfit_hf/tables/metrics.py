"""The metrics of each kind of task, as the field reports them, and what a constant answer reaches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encoding import IGNORED
from .problem import Kind, Problem
from .spans import entity_scores, has_entities

WORDS = {
    "accuracy": "accuracy",
    "f1_macro": "F1 (mean of the labels)",
    "f1_micro": "F1 (all labels together)",
    "matthews_correlation": "Matthews' correlation",
    "exact_match": "all labels right",
    "spearmanr": "Spearman's correlation",
    "pearsonr": "Pearson's correlation",
    "rmse": "root mean squared error",
    "mae": "mean absolute error",
    "entity_f1": "F1 of entities",
    "entity_precision": "precision of entities",
    "entity_recall": "recall of entities",
}
LOWER_IS_BETTER = ("rmse", "mae")


def main_metric(problem: Problem) -> str:
    """The metric that the best epoch is chosen by.

    For a classification it is the mean F1 of the labels, in which a rare label counts as much as a frequent one: a
    model that always gives the frequent one does not look good by it.
    """
    if problem.kind is Kind.TOKENS:
        return "entity_f1" if has_entities(problem.labels) else "accuracy"
    return {Kind.CLASSIFICATION: "f1_macro", Kind.MULTI_LABEL: "f1_micro", Kind.REGRESSION: "rmse"}[problem.kind]


def metric_names(problem: Problem) -> tuple[str, ...]:
    """The metrics of [`scores`], in their order."""
    if problem.kind is Kind.TOKENS:
        entities = ("entity_f1", "entity_precision", "entity_recall") if has_entities(problem.labels) else ()
        return (*entities, "accuracy")
    return {
        Kind.CLASSIFICATION: ("accuracy", "f1_macro", "matthews_correlation"),
        Kind.MULTI_LABEL: ("f1_micro", "f1_macro", "exact_match"),
        Kind.REGRESSION: ("rmse", "mae", "spearmanr", "pearsonr"),
    }[problem.kind]


@dataclass(frozen=True)
class Answers:
    """
    Right answers and a model's, in the same form.

    Args:
        right (array), given (array): Of a classification or a regression `[rows]`, of several labels `[rows, labels]`
            with 0 and 1, of a token classification `[rows, tokens]` with -100 where there is no word.
        lost_words (`int`): Words that no token stands for; they count as wrong.
    """

    right: Any
    given: Any
    lost_words: int = 0


def scores(problem: Problem, answers: Answers) -> dict[str, float]:
    """All metrics of a task.

    Args:
        problem ([`Problem`]): The task.
        answers ([`Answers`]): What is right, and what a model says.

    Returns:
        `dict[str, float]`: By name, the one that matters most first.
    """
    right, given = np.asarray(answers.right), np.asarray(answers.given)
    if problem.kind is Kind.REGRESSION:
        return regression_scores(right, given)
    if problem.kind is Kind.TOKENS:
        return _token_scores(problem, right, given, answers.lost_words)
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    every = list(range(len(problem.labels)))
    macro = float(f1_score(right, given, labels=every, average="macro", zero_division=0))
    if problem.kind is Kind.MULTI_LABEL:
        micro = float(f1_score(right, given, average="micro", zero_division=0))
        return {"f1_micro": micro, "f1_macro": macro, "exact_match": float(accuracy_score(right, given))}
    return {
        "accuracy": float(accuracy_score(right, given)),
        "f1_macro": macro,
        "matthews_correlation": float(matthews_corrcoef(right, given)),
    }


def regression_scores(right: Any, given: Any) -> dict[str, float]:
    """Errors in the label's own unit, and correlations."""
    errors = np.asarray(given, dtype=np.float64) - np.asarray(right, dtype=np.float64)
    return {
        "rmse": float(np.sqrt(np.mean(errors**2))),
        "mae": float(np.mean(np.abs(errors))),
        **correlations(right, given),
    }


def correlations(right: Any, given: Any) -> dict[str, float]:
    """Spearman's and Pearson's correlation. Of a constant answer, where they are not defined, 0: it tells nothing."""
    from scipy.stats import ConstantInputWarning, pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        found = {
            "spearmanr": float(spearmanr(right, given).statistic),
            "pearsonr": float(pearsonr(right, given).statistic),
        }
    if not np.all(np.isfinite(given)):
        return found
    return {name: 0.0 if math.isnan(value) else value for name, value in found.items()}


def word_accuracy(right: Any, given: Any, lost_words: int = 0) -> float:
    """Share of words that have their right label, of labels `[rows, tokens]` that are -100 but at one token a word.

    Words that no token stands for, since their text was cut, count as wrong.
    """
    words = np.asarray(right) != IGNORED
    return float((np.asarray(given) == np.asarray(right))[words].sum() / (words.sum() + lost_words))


def _token_scores(problem: Problem, right: Any, given: Any, lost_words: int) -> dict[str, float]:
    found = {"accuracy": word_accuracy(right, given, lost_words)}
    if not has_entities(problem.labels):
        return found
    rows = [
        ([problem.labels[i] for i in row[row != IGNORED]], [problem.labels[i] for i in other[row != IGNORED]])
        for row, other in zip(right, given)
    ]
    return {**entity_scores([row for row, _ in rows], [other for _, other in rows]), **found}


def label_scores(problem: Problem, answers: Answers) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each label, and in how many rows (or words) it is right."""
    if problem.kind is Kind.REGRESSION:
        return []
    from sklearn.metrics import precision_recall_fscore_support

    right, given = np.asarray(answers.right), np.asarray(answers.given)
    if problem.kind is Kind.TOKENS:
        words = right != IGNORED
        right, given = right[words], given[words]
    every = list(range(len(problem.labels)))
    columns = precision_recall_fscore_support(right, given, labels=every, zero_division=0)
    return [
        {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "count": int(c)}
        for name, p, r, f, c in zip(problem.labels, *columns)
    ]


def constant_answer(problem: Problem, labels: Sequence[Any]) -> Any:
    """The one answer that is right most often in these labels: the label that most rows have, or their mean.

    Of several labels it is the yes or no that is more frequent of each.
    """
    if problem.kind is Kind.REGRESSION:
        return float(np.mean(labels))
    if problem.kind is Kind.MULTI_LABEL:
        return (np.mean(np.asarray(labels), axis=0) > 0.5).astype(float)
    flat = [label for row in labels for label in row] if problem.kind is Kind.TOKENS else labels
    return int(np.bincount(np.asarray(flat, dtype=np.int64)).argmax())


def constant_scores(problem: Problem, answer: Any, right: Any, lost_words: int = 0) -> dict[str, float]:
    """What always giving `answer` reaches, the majority class of a classification.

    Args:
        problem ([`Problem`]): The task.
        answer (`Any`): Of [`constant_answer`], for the rows that are trained on.
        right (array): The right answers of the rows that are evaluated on.
        lost_words (`int`, *optional*, defaults to 0): As in [`Answers`].
    """
    right = np.asarray(right)
    given = np.broadcast_to(np.asarray(answer), right.shape)
    return scores(problem, Answers(right, given, lost_words))
