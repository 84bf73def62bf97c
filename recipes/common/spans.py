"""Extractive question answering: contexts as overlapping windows of tokens, and logits as spans of the context's text.

A context that does not fit into the model's input is seen through several windows, each with the whole question before
it. A window knows where its context tokens begin and which characters of the context each of them covers. An answer is
the best-scoring span over all windows of its question, with score `start_logit + end_logit` (Devlin et al., 2019,
section 4.2), and its text is cut out of the context by character offsets, so it is exactly what is written there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from transformers import PreTrainedTokenizerBase

Offsets = Sequence[Sequence[int]]  # of tokens: the characters [start, end) of the context that each covers


@dataclass(frozen=True)
class Span:
    """Characters `[start, end)` of a context, with the sum of the logits of its first and last token."""

    score: float
    start: int
    end: int


def answer_tokens(offsets: Offsets, start: int, end: int) -> tuple[int, int] | None:
    """The first and last of the tokens that cover the characters `[start, end)`.

    An answer that starts or ends inside a token gets the whole token.

    Returns:
        `tuple[int, int]`, *optional*: Indices into `offsets`, both inclusive. `None` if the tokens do not reach over
        the whole answer, or none of them covers a character of it.
    """
    if not offsets or offsets[0][0] > start or offsets[-1][1] < end:
        return None
    covering = [index for index, (left, right) in enumerate(offsets) if max(left, start) < min(right, end)]
    return (covering[0], covering[-1]) if covering else None


def check_windows(
    tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int, max_question_length: int
) -> None:
    """Checks what [`make_windows`] is going to be called with.

    Raises:
        `ValueError`: The tokenizer is a slow one, its model takes no inputs of that length, or windows of these
            lengths would never get through a context.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer and gives no character offsets, which the text of an "
            "answer is cut out by. Use the model's fast tokenizer (a checkpoint with tokenizer.json has one)."
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens that the model takes "
            f"({tokenizer.name_or_path}). Pass a smaller one."
        )
    room = max_length - max_question_length - tokenizer.num_special_tokens_to_add(pair=True)
    if doc_stride >= room:
        raise ValueError(
            f"max_length={max_length} leaves {room} tokens for the context beside max_question_length="
            f"{max_question_length} and the special tokens; doc_stride={doc_stride} must be smaller than that, or "
            "neighbouring windows would be the same."
        )


def make_windows(
    rows: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 384,
    doc_stride: int = 128,
    max_question_length: int = 64,
) -> dict[str, list[Any]]:
    """Turns questions on contexts into windows; for `datasets.Dataset.map(batched=True, with_indices=True)`.

    Args:
        rows (`Mapping[str, Sequence]`):
            Columns `question`, `context` and `answers` (each with the parallel lists `text` and `answer_start`).
        indices (`Sequence[int]`): The questions' places in their data set.
        tokenizer (`PreTrainedTokenizerBase`): A fast one, which knows the offsets of its tokens.
        max_length (`int`, *optional*, defaults to 384): Tokens of a window, with the question and special tokens.
        doc_stride (`int`, *optional*, defaults to 128): Tokens of the context that two neighbouring windows share.
        max_question_length (`int`, *optional*, defaults to 64): Tokens after which a question is cut.

    Returns:
        `dict[str, list]`: The model's inputs with `start_positions` and `end_positions` of the first gold answer (the
        first token where the window does not hold all of it, as for BERT), and for each window `question_index`,
        `context_start` (the index of the first context token) and `offsets` of its context tokens.

    Raises:
        `ValueError`: See [`check_windows`].
    """
    check_windows(tokenizer, max_length, doc_stride, max_question_length)
    encoded = tokenizer(
        _shortened(rows["question"], tokenizer, max_question_length),
        list(rows["context"]),
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    all_offsets, row_of_window = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping")
    windows: dict[str, list[Any]] = {name: list(values) for name, values in encoded.items()}
    added = ("start_positions", "end_positions", "question_index", "context_start", "offsets")
    windows.update({name: [] for name in added})
    for window, (offsets, row) in enumerate(zip(all_offsets, row_of_window)):
        is_context = [part == 1 for part in encoded.sequence_ids(window)]
        first = is_context.index(True) if any(is_context) else len(is_context)
        offsets = [list(pair) for pair, inside in zip(offsets, is_context) if inside]
        tokens = answer_tokens(offsets, *_answer_characters(rows["answers"][row]))
        start, end = (first + tokens[0], first + tokens[1]) if tokens else (0, 0)
        for name, value in zip(added, (start, end, indices[row], first, offsets)):
            windows[name].append(value)
    return windows


def _shortened(questions: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[str]:
    questions = list(questions)
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        question if len(tokens) <= max_tokens else question[: tokens[max_tokens - 1][1]]
        for question, tokens in zip(questions, offsets)
    ]


def _answer_characters(answers: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """Of the first gold answer, without the white space around it, which belongs to no token."""
    text, start = answers["text"][0], answers["answer_start"][0]
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def window_spans(
    start_logits: np.ndarray, end_logits: np.ndarray, offsets: Offsets, n_best: int = 20, max_answer_length: int = 30
) -> list[Span]:
    """The best spans of one window, over *all* pairs of a start and an end: the search is exact.

    Args:
        start_logits (`np.ndarray` of shape `(context_tokens,)`): Of the window's context tokens only.
        end_logits (`np.ndarray` of shape `(context_tokens,)`): Likewise.
        offsets (`Sequence[Sequence[int]]` of shape `(context_tokens, 2)`): What each token covers, in characters.
        n_best (`int`, *optional*, defaults to 20): How many token spans are taken.
        max_answer_length (`int`, *optional*, defaults to 30): In tokens.

    Returns:
        `list[Span]`: Best first, of equal ones the earlier and shorter one. Spans that cover no character are left
        out.
    """
    if not len(offsets):
        return []
    begins, stops = np.asarray(offsets).T
    beyond = (0, max_answer_length - 1)

    def ends(values: np.ndarray, filler: float) -> np.ndarray:
        """`[i, j]` is the value of token `i + j`, the last of the span of `j + 1` tokens that begins with `i`."""
        return sliding_window_view(np.pad(values, beyond, constant_values=filler), max_answer_length)

    # In double precision, so that different sums of logits stay different.
    with np.errstate(invalid="ignore"):  # inf - inf: no finite score, so no span
        scores = np.asarray(start_logits, np.float64)[:, None] + ends(np.asarray(end_logits, np.float64), -np.inf)
    possible = np.isfinite(scores) & (ends(stops, 0) > begins[:, None])
    scores = np.where(possible, scores, -np.inf).ravel()
    worst = np.partition(scores, -n_best)[-n_best] if n_best < len(scores) else -np.inf
    candidates = np.flatnonzero((scores >= worst) & possible.ravel())
    best = candidates[np.argsort(-scores[candidates], kind="stable")][:n_best]
    starts, lengths = np.divmod(best, max_answer_length)
    return [
        Span(float(scores[index]), int(begins[start]), int(stops[start + length]))
        for index, start, length in zip(best, starts, lengths)
    ]


def merge_spans(windows: Iterable[Iterable[Span]], n_best: int = 20) -> list[Span]:
    """The best spans of a question over its windows; characters seen in several windows keep their best score."""
    best: dict[tuple[int, int], Span] = {}
    for span in (span for spans in windows for span in spans):
        known = best.get((span.start, span.end))
        if known is None or span.score > known.score:
            best[span.start, span.end] = span
    return sorted(best.values(), key=lambda span: (-span.score, span.start, span.end))[:n_best]


def find_answers(
    questions: Iterable[Mapping[str, Any]],
    windows: Collection[Mapping[str, Any]],
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> dict[str, list[dict[str, Any]]]:
    """Reads the answers to all questions off the logits of all windows.

    Args:
        questions (`Iterable[Mapping]`): Rows with `id` and `context`.
        windows (`Collection[Mapping]`): Rows of [`make_windows`], in any order, for these questions.
        start_logits (`np.ndarray` of shape `(windows, tokens)`): In the order of `windows`, padded on the right.
        end_logits (`np.ndarray` of shape `(windows, tokens)`): Likewise.
        n_best (`int`, *optional*, defaults to 20): Answers to keep per question.
        max_answer_length (`int`, *optional*, defaults to 30): In tokens.

    Returns:
        `dict[str, list[dict]]`: Per question id, in the order of `questions`, its answers, best first: `text`,
        `start` and `end` in characters, `score`, and `probability`, a softmax over this list. Never empty: where no
        span can be found (an empty context, or logits that are not numbers), the one answer is the empty text.

    Raises:
        `ValueError`: There are not as many logits as windows.
    """
    if not len(start_logits) == len(end_logits) == len(windows):
        raise ValueError(
            f"There are start logits of {len(start_logits)} and end logits of {len(end_logits)} windows for "
            f"{len(windows)}: pass the logits of exactly these windows, in their order."
        )
    found: dict[int, list[list[Span]]] = {}
    for window, starts, ends in zip(windows, start_logits, end_logits):
        offsets, first = window["offsets"], window["context_start"]
        context = slice(first, first + len(offsets))
        spans = window_spans(starts[context], ends[context], offsets, n_best, max_answer_length)
        found.setdefault(window["question_index"], []).append(spans)
    answers = {}
    for index, question in enumerate(questions):
        spans = merge_spans(found.get(index, ()), n_best) or [Span(0.0, 0, 0)]
        scores = np.array([span.score for span in spans])
        probabilities = np.exp(scores - scores.max())
        answers[question["id"]] = [
            {
                "text": question["context"][span.start : span.end],
                "start": span.start,
                "end": span.end,
                "score": span.score,
                "probability": float(probability),
            }
            for span, probability in zip(spans, probabilities / probabilities.sum())
        ]
    return answers
