"""The metrics of the tasks, on scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from bitfit_hf.tables.metrics import correlations
from bitfit_hf.tables.metrics import word_accuracy as share_of_words

from .data import GLUE

Metrics = Callable[[EvalPrediction], dict[str, float]]


def accuracy(labels: Any, predictions: Any) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float(accuracy_score(labels, predictions))}


def accuracy_and_f1(labels: Any, predictions: Any) -> dict[str, float]:
    """Accuracy, and F1 of class 1."""
    return accuracy(labels, predictions) | {"f1": float(f1_score(labels, predictions))}


def matthews_correlation(labels: Any, predictions: Any) -> dict[str, float]:
    """Matthews' correlation coefficient, from -1 to 1; 0 for a constant answer."""
    return {"matthews_correlation": float(matthews_corrcoef(labels, predictions))}


def constant(prediction: EvalPrediction) -> bool | None:
    """
    Whether a model answers the same to everything, as one that has collapsed does; `None` for answers of other forms.

    Args:
        prediction ([`~transformers.EvalPrediction`]): Logits `[rows, classes]` or `[rows, 1]`, or tags (or their
            logits) `[rows, tokens]` with labels that are -100 but at one token of each word.
    """
    if isinstance(prediction.predictions, tuple) or isinstance(prediction.label_ids, tuple):
        return None
    predictions, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if labels.ndim == 2:
        tags = predictions.argmax(-1) if predictions.ndim == 3 else predictions
        if tags.shape != labels.shape:  # a language model's losses, for example
            return None
        given = tags[labels != -100]
    elif predictions.ndim == 2:
        given = answers(predictions)
    else:
        return None
    return bool(len(given) and np.ptp(given) <= 1e-3 * np.abs(given).max())


_BY_METRIC = {
    "accuracy": accuracy,
    "f1": accuracy_and_f1,
    "matthews_correlation": matthews_correlation,
    "spearmanr": correlations,
}


def answers(logits: np.ndarray) -> np.ndarray:
    """What a model answers: the likeliest class of `[rows, classes]`, the value itself of `[rows, 1]`."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)


def metrics_with(name: str) -> Metrics:
    """
    A `compute_metrics` for a Trainer, of a classifier or a regression.

    Args:
        name (`str`): The metric that matters; what is usually reported beside it comes along.
    """
    compute = _BY_METRIC[name]
    return lambda prediction: compute(prediction.label_ids, answers(prediction.predictions))


def glue_metrics(task: str) -> Metrics:
    """
    What the paper and GLUE report of a task, as a `compute_metrics` for a Trainer.

    Args:
        task (`str`): A key of [`GLUE`]: Matthews' correlation for CoLA, Spearman's and Pearson's for STS-B, accuracy
            and F1 for MRPC and QQP, accuracy for the others.
    """
    return metrics_with(GLUE[task].metric)


def word_accuracy(lost: int = 0) -> Metrics:
    """
    Share of words tagged rightly, for labels `[rows, tokens]` that are -100 but at one token of each word.

    Args:
        lost (`int`, *optional*, defaults to 0): Words that no token stands for, since their text was cut. They count
            as wrong, so that accuracy is over all words.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        tags = np.asarray(prediction.predictions)
        if tags.ndim == 3:
            tags = tags.argmax(-1)
        return {"accuracy": share_of_words(prediction.label_ids, tags, lost)}

    return compute
