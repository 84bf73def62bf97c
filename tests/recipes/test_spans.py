"""Windows and spans of extractive question answering, against searches that look at everything one by one."""

from __future__ import annotations

import numpy as np
import pytest
import quickstart
from common.spans import Span, answer_tokens, find_answers, make_windows, merge_spans, window_spans
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def bert_tokenizer():
    return AutoTokenizer.from_pretrained(quickstart.demo_model())


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A byte-level BPE without merges: each UTF-8 byte is a token, so one character may be several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(params=["bert", "bytes"])
def tokenizer(request, bert_tokenizer, byte_tokenizer):
    return bert_tokenizer if request.param == "bert" else byte_tokenizer


def rows_of(*cases: tuple[str, str, str]) -> dict[str, list]:
    """Columns of questions, contexts and an answer each, which is found in its context."""
    return {
        "question": [question for question, _, _ in cases],
        "context": [context for _, context, _ in cases],
        "answers": [{"text": [answer], "answer_start": [context.index(answer)]} for _, context, answer in cases],
    }


LONG = " ".join(f"The {i}th visitor of the museum in Łódź paid {7 * i} złoty 🙂 on day {i}." for i in range(30))
CASES = rows_of(
    ("Who paid 91?", LONG, "The 13th visitor"),
    ("What was paid last?", LONG, "203 złoty 🙂"),
    ("Where?", "In Łódź — 東京 — or Zürich.", "東京"),
    ("What is it?", "It is re-\ntrained, isn't it?", " re-\ntrained"),
)


@pytest.mark.parametrize(("max_length", "doc_stride"), [(64, 16), (96, 0), (384, 128)])
def test_windows_cover_every_context_without_a_gap(tokenizer, max_length, doc_stride):
    windows = Dataset.from_dict(
        make_windows(
            CASES,
            [10, 11, 12, 13],
            tokenizer=tokenizer,
            max_length=max_length,
            doc_stride=doc_stride,
            max_question_length=24,
        )
    )
    assert set(windows["question_index"]) == {10, 11, 12, 13}
    several = 0
    for row, context in enumerate(CASES["context"]):
        encoded = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
        whole = [(token, *pair) for token, pair in zip(encoded.input_ids, encoded.offset_mapping)]
        joined = []
        mine = [window for window in windows if window["question_index"] == 10 + row]
        for window in mine:
            ids = window["input_ids"][window["context_start"] :]
            tokens = [(token, *pair) for token, pair in zip(ids, window["offsets"])]
            shared = doc_stride if joined else 0
            assert tokens[:shared] == joined[len(joined) - shared :]
            joined += tokens[shared:]
        assert joined == whole
        several += len(mine) > 1
    assert several == 2 or max_length == 384
    for window in windows:
        assert len(window["input_ids"]) <= max_length
        row = window["question_index"] - 10
        question = tokenizer.decode(window["input_ids"][1 : window["context_start"]], skip_special_tokens=True)
        assert question.strip().lower() == CASES["question"][row].lower()
        after = window["context_start"] + len(window["offsets"])
        assert window["input_ids"][after:] == tokenizer("", "").input_ids[-1:]


def test_positions_are_those_of_the_answer_wherever_a_window_holds_all_of_it(tokenizer):
    windows = make_windows(CASES, range(4), tokenizer=tokenizer, max_length=96, doc_stride=40, max_question_length=24)
    labelled = dict.fromkeys(range(4), 0)
    for index, row in enumerate(windows["question_index"]):
        context, answer = CASES["context"][row], CASES["answers"][row]["text"][0].strip()
        start, end = windows["start_positions"][index], windows["end_positions"][index]
        offsets, first = windows["offsets"][index], windows["context_start"][index]
        seen = context[offsets[0][0] : offsets[-1][1]]
        if start:
            labelled[row] += 1
            assert context[offsets[start - first][0] : offsets[end - first][1]] == answer
        else:
            assert end == 0
            assert answer not in seen
    assert all(labelled.values()), labelled


def test_an_answer_inside_a_token_gets_the_whole_token(bert_tokenizer):
    rows = {
        "question": ["When?"],
        "context": ["In 1990s cars"],
        "answers": [{"text": ["990"], "answer_start": [4]}],
    }
    windows = make_windows(rows, [0], tokenizer=bert_tokenizer)
    (tokens,) = bert_tokenizer.batch_decode([windows["input_ids"][0][windows["start_positions"][0] :][:1]])
    assert tokens == "1990s"
    assert windows["start_positions"] == windows["end_positions"]


def test_a_long_question_is_cut_and_leading_space_does_no_harm(bert_tokenizer):
    rows = rows_of(("  why " * 50, "Because of that.", "that"))
    windows = make_windows(rows, [0], tokenizer=bert_tokenizer, max_length=40, doc_stride=5, max_question_length=8)
    assert windows["input_ids"][0] == bert_tokenizer("why " * 8, rows["context"][0]).input_ids
    assert windows["context_start"] == [10]


def test_an_empty_context_is_one_window_without_an_answer(bert_tokenizer):
    rows = {"question": ["Why?"], "context": [""], "answers": [{"text": ["x"], "answer_start": [0]}]}
    windows = make_windows(rows, [0], tokenizer=bert_tokenizer)
    assert (windows["offsets"], windows["start_positions"]) == ([[]], [0])
    found = find_answers([{"id": "a", "context": ""}], Dataset.from_dict(windows), np.zeros((1, 5)), np.zeros((1, 5)))
    assert [answer["text"] for answer in found["a"]] == [""]


def test_windows_that_would_never_get_through_a_context_are_refused(bert_tokenizer):
    with pytest.raises(ValueError, match=r"leaves 29 tokens .* doc_stride=29 must be smaller"):
        make_windows(CASES, range(4), tokenizer=bert_tokenizer, max_length=96, doc_stride=29)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="slow tokenizer and gives no character offsets"):
        make_windows(CASES, range(4), tokenizer=Slow())


# Logits as whole numbers, so that equal scores are common.
logits = st.integers(-4, 4)


@st.composite
def scored_windows(draw, most_tokens: int = 12):
    """Offsets as tokenizers give them: in order, with gaps, some of no character, some several of one character."""
    tokens = draw(st.integers(0, most_tokens))
    offsets, position = [], draw(st.integers(0, 3))
    for _ in range(tokens):
        if offsets and draw(st.booleans()) and draw(st.booleans()):
            offsets.append(offsets[-1])
            continue
        position += draw(st.integers(0, 2))
        width = draw(st.integers(0, 3))
        offsets.append([position, position + width])
        position += width
    starts, ends = (draw(st.lists(logits, min_size=tokens, max_size=tokens)) for _ in range(2))
    return np.array(starts, np.float32), np.array(ends, np.float32), offsets


def all_spans(start_logits, end_logits, offsets, max_answer_length) -> list[Span]:
    """Every allowed pair of tokens, one by one, in the order of preference."""
    pairs = [
        (i, j)
        for i in range(len(offsets))
        for j in range(i, min(i + max_answer_length, len(offsets)))
        if offsets[j][1] > offsets[i][0]
    ]
    pairs.sort(key=lambda pair: (-(start_logits[pair[0]] + end_logits[pair[1]]), pair))
    return [Span(float(start_logits[i] + end_logits[j]), offsets[i][0], offsets[j][1]) for i, j in pairs]


@settings(deadline=None, max_examples=200)
@given(scored_windows(), st.integers(1, 30), st.integers(1, 8))
def test_spans_of_a_window_are_those_of_a_full_search(window, n_best, max_answer_length):
    expected = all_spans(*window, max_answer_length)
    assert window_spans(*window, n_best, max_answer_length) == expected[:n_best]


@settings(deadline=None, max_examples=100)
@given(st.lists(scored_windows(), max_size=4), st.integers(1, 20))
def test_merged_spans_are_distinct_and_the_best_of_all_windows(windows, n_best):
    everything = [span for window in windows for span in all_spans(*window, 5)]
    merged = merge_spans([window_spans(*window, n_best, 5) for window in windows], n_best)
    assert len({(span.start, span.end) for span in merged}) == len(merged) <= n_best
    assert [span.score for span in merged] == sorted((span.score for span in merged), reverse=True)
    assert all(span in everything for span in merged)
    if everything:
        best = max(span.score for span in everything)
        first = min((span.start, span.end) for span in everything if span.score == best)
        assert merged[0].score == best
        if n_best == 20:  # with fewer, an equally good span may not be among a window's best
            assert first <= (merged[0].start, merged[0].end)
    else:
        assert merged == []


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_the_best_over_windows_and_exactly_what_the_context_says(tokenizer, bert_tokenizer, seed):
    """With the question's logits far above all others, and against a search over all windows of a question."""
    generator = np.random.default_rng(seed)
    options = {"max_length": 80, "doc_stride": 30, "max_question_length": 24}
    windows = Dataset.from_dict(make_windows(CASES, range(4), tokenizer=tokenizer, **options))
    windows = windows.shuffle(seed=seed)
    longest = max(map(len, windows["input_ids"]))
    starts, ends = generator.normal(size=(2, len(windows), longest)).astype(np.float32)
    questions = [{"id": f"q{row}", "context": context} for row, context in enumerate(CASES["context"])]
    best = {}
    for index, window in enumerate(windows):
        first, offsets = window["context_start"], window["offsets"]
        for logit in (starts, ends):
            logit[index, :first] = 50
            logit[index, first + len(offsets) :] = 50
        context = slice(first, first + len(offsets))
        spans = all_spans(starts[index, context], ends[index, context], offsets, 6)
        best.setdefault(window["question_index"], []).extend(spans)
    found = find_answers(questions, windows, starts, ends, n_best=5, max_answer_length=6)
    assert list(found) == ["q0", "q1", "q2", "q3"]
    for row, answers in enumerate(found.values()):
        span = max(best[row], key=lambda span: span.score)
        assert answers[0]["text"] == CASES["context"][row][span.start : span.end] != ""
        assert (answers[0]["start"], answers[0]["end"]) == (span.start, span.end)
        assert answers[0]["score"] == pytest.approx(span.score)
        texts = {(answer["start"], answer["end"]) for answer in answers}
        assert len(texts) == len(answers) <= 5
        assert len(answers) == 5 or tokenizer is not bert_tokenizer  # bytes of one character give the same text
        assert sum(answer["probability"] for answer in answers) == pytest.approx(1)
        assert answers[0]["probability"] > answers[1]["probability"]


def test_gold_positions_give_back_the_gold_answers(tokenizer):
    options = {"max_length": 80, "doc_stride": 40, "max_question_length": 24}
    windows = Dataset.from_dict(make_windows(CASES, range(4), tokenizer=tokenizer, **options))
    logits = np.zeros((2, len(windows), max(map(len, windows["input_ids"]))))
    for index, window in enumerate(windows):
        for side, column in enumerate(("start_positions", "end_positions")):
            if window[column]:
                logits[side, index, window[column]] = 9
    questions = [{"id": str(row), "context": context} for row, context in enumerate(CASES["context"])]
    found = find_answers(questions, windows, *logits, max_answer_length=80)
    assert [found[str(row)][0]["text"] for row in range(4)] == [a["text"][0].strip() for a in CASES["answers"]]


def test_logits_that_are_not_numbers_are_no_spans():
    offsets = [[0, 2], [3, 5], [6, 8]]
    starts = np.array([np.nan, 0.0, np.inf])
    assert window_spans(starts, np.zeros(3), offsets) == [Span(0.0, 3, 5), Span(0.0, 3, 8)]
    assert window_spans(np.full(3, np.nan), np.zeros(3), offsets, n_best=1) == []


def test_logits_of_other_windows_are_refused():
    windows = [{"question_index": 0, "context_start": 0, "offsets": [[0, 1]]}]
    with pytest.raises(ValueError, match="start logits of 2 and end logits of 1 windows for 1"):
        find_answers([{"id": "a", "context": "x"}], windows, np.zeros((2, 1)), np.zeros((1, 1)))


def test_tokens_of_an_answer():
    offsets = [[2, 4], [5, 7], [7, 7], [7, 9], [9, 10]]
    assert answer_tokens(offsets, 5, 9) == (1, 3)
    assert answer_tokens(offsets, 2, 10) == (0, 4)
    assert answer_tokens(offsets, 6, 8) == (1, 3)
    assert answer_tokens(offsets, 4, 5) is None  # between two tokens
    assert answer_tokens(offsets, 1, 4) is None  # begins before the window
    assert answer_tokens(offsets, 9, 11) is None  # ends after it
    assert answer_tokens([], 0, 1) is None
