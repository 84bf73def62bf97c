"""Exact match and F1 of extractive answers, as the official SQuAD v1.1 script defines them (Rajpurkar et al., 2016).

Both compare *normalised* answers: lower-cased, without ASCII punctuation, without the articles "a", "an" and "the",
and with white space collapsed. A question's score is the best over its gold answers; a data set's is the mean, in
percent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Normalises an answer for comparison.

    Punctuation is removed, not replaced: "part-time" becomes "parttime". An article is replaced by a space, after the
    punctuation is gone: in "the-end" none is left to find. Unicode punctuation stays, as in the official script.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1.0 if the normalised answers are equal, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def f1(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words of the normalised answers, which count as bags.

    0.0 without a common word, so also for two answers of which nothing is left after normalisation: these are an exact
    match all the same, as in version 1.1 of the official script.
    """
    predicted, expected = Counter(normalize_answer(prediction).split()), Counter(normalize_answer(gold).split())
    common = (predicted & expected).total()
    if not common:
        return 0.0
    precision, recall = common / predicted.total(), common / expected.total()
    return 2 * precision * recall / (precision + recall)


def squad_scores(predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Scores a data set.

    Args:
        predictions (`Mapping[str, str]`): The predicted answer per question id. Ids without gold answers are ignored.
        golds (`Mapping[str, Sequence[str]]`): The gold answers per question id, at least one each.

    Returns:
        `dict[str, float]`: `exact_match` and `f1` in percent over all questions of `golds`. A question without a
        prediction counts as wrong.

    Raises:
        `ValueError`: There are no questions, or some without a gold answer.
    """
    if not golds:
        raise ValueError("No questions to score: `golds` is empty.")
    if unanswerable := [name for name, answers in golds.items() if not answers]:
        raise ValueError(
            f"{len(unanswerable)} question(s) have no gold answer, {unanswerable[0]!r} for one. SQuAD v1.1 has at "
            "least one answer per question; the unanswerable questions of v2 have no place in its metric."
        )
    totals = {"exact_match": 0.0, "f1": 0.0}
    for name, answers in golds.items():
        if name in predictions:
            totals["exact_match"] += max(exact_match(predictions[name], gold) for gold in answers)
            totals["f1"] += max(f1(predictions[name], gold) for gold in answers)
    return {metric: 100 * total / len(golds) for metric, total in totals.items()}
