"""What a task gives away without reading: the most frequent label, and a bag of words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import EvalPrediction

Texts = Sequence[str]


def _scored(
    predicted: np.ndarray, labels: Sequence[int], metrics: Callable[[EvalPrediction], dict[str, float]]
) -> Any:
    """The metrics of predicted labels, given to the function as logits."""
    logits = np.eye(1 + max(*predicted.tolist(), *labels), dtype=np.float32)[predicted]
    return metrics(EvalPrediction(logits, np.asarray(labels)))


def majority(
    train: Sequence[int], labels: Sequence[int], metrics: Callable[[EvalPrediction], dict[str, float]]
) -> Any:
    """Metrics of giving the most frequent label of the training rows to every row.

    Args:
        train (`Sequence[int]`): Labels of the training rows.
        labels (`Sequence[int]`): Those of the rows that are scored.
        metrics (`Callable`): As `Trainer(compute_metrics=...)` takes it.

    Returns:
        `dict[str, float]`: What `metrics` returns.
    """
    return _scored(np.full(len(labels), np.bincount(train).argmax()), labels, metrics)


def bag_of_words(
    train: tuple[Texts, Sequence[int]],
    rows: tuple[Texts, Sequence[int]],
    metrics: Callable[[EvalPrediction], dict[str, float]],
    ngrams: tuple[int, int] = (1, 1),
) -> Any:
    """Metrics of logistic regression on which words a text has.

    Args:
        train (`tuple[Sequence[str], Sequence[int]]`): Texts and labels that it is fitted on.
        rows (`tuple[Sequence[str], Sequence[int]]`): Those that are scored.
        metrics (`Callable`): As `Trainer(compute_metrics=...)` takes it.
        ngrams (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): From how many words to how many.

    Returns:
        `dict[str, float]`: What `metrics` returns.
    """
    vectorizer = CountVectorizer(ngram_range=ngrams, token_pattern=r"[\w-]+")
    model = LogisticRegression(max_iter=2000).fit(vectorizer.fit_transform(train[0]), train[1])
    return _scored(model.predict(vectorizer.transform(rows[0])), rows[1], metrics)
