"""EM and F1 of SQuAD v1.1: fixed cases whose scores follow from the official script's definitions by hand."""

from __future__ import annotations

import pytest
from common.answers import exact_match, f1, normalize_answer, squad_scores
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Cat", "cat"),
        ("a cat, an owl and the dog", "cat owl and dog"),
        ("Theatre at another anthem", "theatre at another anthem"),  # articles are whole words
        ("  two\t\nlines  ", "two lines"),
        ("U.S.", "us"),
        ("part-time", "parttime"),  # punctuation is removed, not replaced
        ("the-end", "theend"),  # before the articles are looked for
        ("A.", ""),
        ("$1,000.50", "100050"),
        ("“quoted”", "“quoted”"),  # ASCII punctuation only
        ("Saint–Étienne", "saint–étienne"),
        ("non\u00a0breaking", "non breaking"),
        ("ÉCOLE", "école"),
        ("", ""),
    ],
)
def test_normalized_answers(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "gold", "match", "overlap"),
    [
        ("Denver Broncos", "Denver Broncos", 1, 1),
        ("the Denver Broncos!", "denver broncos", 1, 1),
        ("Broncos", "Denver Broncos", 0, 2 / 3),  # precision 1, recall 1/2
        ("in Santa Clara, California", "Santa Clara", 0, 2 / 3),  # precision 1/2, recall 1
        ("Broncos Denver", "Denver Broncos", 0, 1),  # a bag of words
        ("to be or not to be", "to be to", 0, 2 * (3 / 6) * 1 / (3 / 6 + 1)),  # words count as often as they occur
        ("1990", "1991", 0, 0),
        ("", "Denver", 0, 0),
        ("the", "a", 1, 0),  # nothing is left of either: equal, but no common word
        ("naïve", "naive", 0, 0),
        ("Ⅳ", "iv", 0, 0),
    ],
)
def test_one_answer_against_one_gold(prediction, gold, match, overlap):
    assert exact_match(prediction, gold) == match
    assert f1(prediction, gold) == pytest.approx(overlap)
    assert f1(gold, prediction) == pytest.approx(overlap)


def test_the_best_gold_answer_counts_and_scores_are_means_in_percent():
    golds = {
        "several": ["Santa Clara, California", "Levi's Stadium", "Levi's Stadium in Santa Clara"],
        "close": ["gold", "golden anniversary"],
        "wrong": ["1990"],
        "unanswered": ["something"],
    }
    predictions = {"several": "levis stadium", "close": "the anniversary", "wrong": "", "of another set": "1990"}
    scores = squad_scores(predictions, golds)
    assert scores == {"exact_match": pytest.approx(25), "f1": pytest.approx(100 * (1 + 2 / 3) / 4)}


def test_em_and_f1_may_come_from_different_golds():
    assert squad_scores({"q": "the"}, {"q": ["a", "the end"]}) == {"exact_match": 100, "f1": 0}


def test_questions_without_gold_answers_are_refused():
    with pytest.raises(ValueError, match="No questions"):
        squad_scores({}, {})
    with pytest.raises(ValueError, match=r"1 question.* no gold answer, 'v2'"):
        squad_scores({"v2": ""}, {"v1": ["yes"], "v2": []})


words = st.lists(st.sampled_from(["the", "an", "cat", "Dog", "1990", "U.S.", "—", "ß", " "]), max_size=6).map(" ".join)


@given(words, words)
def test_f1_lies_between_match_and_one(prediction, gold):
    score = f1(prediction, gold)
    assert 0 <= score <= 1
    if normalize_answer(gold):
        assert score >= exact_match(prediction, gold)
    assert f1(gold, gold) == bool(normalize_answer(gold))
