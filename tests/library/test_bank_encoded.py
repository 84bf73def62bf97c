"""The two halves of `predict`, for whoever makes batches of their own; and replacing a task in one step."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bank_tester import ATOL, bert_base, random_delta, tokenizer

from bitfit_hf import TaskBank, TextTooLongError, UnknownTaskError

TASKS = ["sequence-3", "multi-4", "regression", "token-4", "question"]
TEXT, PAIR = "a b c d", ("a b", "c d e f a")


def text_for(task: str | None) -> object:
    return PAIR if task == "question" else TEXT


@pytest.fixture(scope="module")
def base():
    return bert_base()


@pytest.fixture
def bank(base) -> TaskBank:
    bank = TaskBank(base, tokenizer())
    for seed, kind in enumerate(TASKS):
        bank.add_task(kind, random_delta(base, kind, seed=seed))
    return bank


def test_the_halves_together_are_predict(bank):
    tasks = [*TASKS, None]
    texts = [bank.encode(text_for(task), task) for task in tasks]
    assert len({text.runs_with for text in texts}) == 1
    assert [text.length for text in texts] == [6, 6, 6, 6, 10, 6]
    whole = bank.predict([text_for(task) for task in tasks], tasks)
    for text, values, expected in zip(texts, bank.run(texts), whole, strict=True):
        answer = text.prediction(values)
        if text.task.name is None:
            assert torch.allclose(answer["last_hidden_state"], expected["last_hidden_state"], atol=ATOL)
        else:
            assert answer == expected


def test_raw_scores_are_logits(bank):
    text = bank.encode(TEXT, "sequence-3")
    (values,) = bank.run([text])
    raw = text.prediction(values, raw_scores=True)["scores"]
    assert list(raw.values()) == values["logits"].tolist()
    assert torch.tensor(list(raw.values())).softmax(-1).tolist() == pytest.approx(
        list(text.prediction(values)["scores"].values()), abs=ATOL
    )


def test_a_long_text_is_cut_or_refused(bank):
    longest = bank.max_length
    assert bank.encode("a " * 40, "sequence-3").length == longest
    with pytest.raises(TextTooLongError, match=f"42 tokens, and the model takes {longest}"):
        bank.encode("a " * 40, "sequence-3", truncate=False)
    assert bank.encode("a " * (longest - 2), "sequence-3", truncate=False).length == longest


def test_a_text_is_answered_by_the_task_it_was_encoded_for_and_no_other(base, bank):
    old = bank.encode(TEXT, "sequence-3")
    expected = bank.predict(TEXT, "regression")
    bank.add_task("sequence-3", random_delta(base, "regression", seed=2), replace=True)
    new = bank.encode(TEXT, "sequence-3")
    with pytest.raises(UnknownTaskError, match="replaced"):
        bank.run([old])
    for both in ([old, new], [new, old]):
        with pytest.raises(UnknownTaskError, match="replaced"):
            bank.run(both)
    assert [new.prediction(values) for values in bank.run([new])] == expected
    bank.remove_task("sequence-3")
    with pytest.raises(UnknownTaskError, match="no task 'sequence-3'"):
        bank.run([new])
    bank.add_task("sequence-3", random_delta(base, "regression", seed=2))
    with pytest.raises(UnknownTaskError, match="replaced"):
        bank.run([new])


def test_a_replaced_task_gives_its_memory_back(base, bank):
    before = bank.memory()
    for seed in range(3):
        bank.add_task("sequence-3", random_delta(base, "sequence-3", seed=seed), replace=True)
    assert bank.memory() == before
    assert bank.tasks == TASKS


def test_a_replacement_that_fails_leaves_the_task(base, bank):
    expected = bank.predict(TEXT, "sequence-3")
    delta = random_delta(base, "sequence-3", seed=9)
    delta.config.base_fingerprint = random_delta(bert_other(), "sequence-3", seed=9).config.base_fingerprint
    with pytest.raises(ValueError, match="checkpoint"):
        bank.add_task("sequence-3", delta, replace=True)
    assert bank.predict(TEXT, "sequence-3") == expected


def bert_other():
    other = bert_base()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.add_(0.01)
    return other


def test_a_replaced_task_within_a_limit(base):
    bank = TaskBank(base, tokenizer(), max_tasks=1)
    for seed in range(3):
        bank.add_task("sequence-3", random_delta(base, "sequence-3", seed=seed), replace=True)
        assert bank.resident_tasks == ["sequence-3"]


def test_many_threads_may_encode(bank):
    """A fast tokenizer keeps how to cut in itself, and refuses a second thread where nobody waits."""
    start = threading.Barrier(4)

    def encode(number: int) -> int:
        start.wait()
        return sum(bank.encode("a " * (number + 1), "sequence-3", truncate=bool(i % 2)).length for i in range(100))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(encode, range(4))) == [300, 400, 500, 600]
