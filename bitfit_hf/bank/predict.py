"""Texts in, labels and scores out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tqdm.auto import tqdm

from ..errors import TaskBankError
from ..tuner.head import Labels
from .padding import Padding

if TYPE_CHECKING:
    from .bank import TaskBank

Prediction: TypeAlias = dict[str, Any] | list[dict[str, Any]]

_SAMPLE = ("Who is it?", "We are.")
_LONGEST_ANSWER = 30  # tokens
_NO_LIMIT = 1_000_000  # a tokenizer's `model_max_length` above this says that it does not know


def predict(
    bank: TaskBank,
    texts: Sequence[str | tuple[str, str]],
    tasks: Sequence[str | None],
    *,
    batch_size: int,
    progress: bool,
) -> list[Prediction]:
    """See [`TaskBank.predict`]."""
    texts, tasks = _check(bank, texts, tasks, batch_size)
    described = {name: bank.describe(name) for name in dict.fromkeys(tasks)}
    _check_kinds(bank, described)
    paddings = {name: _padding(bank, name) for name in described}
    encodings = [_encode(bank, i, texts[i], described[tasks[i]][0]) for i in range(len(texts))]
    answers: list[Prediction] = [{} for _ in texts]
    lengths = [len(encoding["input_ids"]) for encoding in encodings]
    batches = _batches([paddings[name].side for name in tasks], lengths, batch_size)
    for side, chosen in tqdm(batches, desc="predict", unit="batch", disable=not progress):
        batch = _padded(bank, [encodings[i] for i in chosen], side=side)
        output = bank(**batch, tasks=[tasks[i] for i in chosen])
        for row, i in enumerate(chosen):
            values = paddings[tasks[i]].cut(output[row], lengths[i])
            answers[i] = _decode(values, encodings[i], texts[i], *described[tasks[i]])
    return answers


def _padding(bank: TaskBank, name: str | None) -> Padding:
    """What padding does to the answers of a task; tried once for each class."""
    kind = bank.kind_of(name)
    if kind.padding is None:
        encoding = _encode(bank, 0, _SAMPLE[: 2 if is_question(kind.name) else 1], kind.name)

        def answering(length: int | None, side: str | None) -> Mapping[str, Any]:
            (answer,) = bank(**_padded(bank, [encoding], side=side, length=length), tasks=[name])
            return answer

        preferred, length = bank.tokenizer.padding_side, len(encoding["input_ids"])
        kind.padding = Padding.of(answering, length, preferred=preferred, room=_longest(bank))
    return kind.padding


def _batches(
    sides: Sequence[str | None], lengths: Sequence[int], batch_size: int
) -> list[tuple[str | None, list[int]]]:
    """Which texts run together, padded on which side."""
    groups: dict[tuple[str | None, int], list[int]] = {}
    # The longest first: memory is sufficient for all that follow, and what is left of the time is shown truly.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        groups.setdefault((sides[i], 0 if sides[i] else lengths[i]), []).append(i)
    return [
        (group[0], members[start : start + batch_size])
        for group, members in groups.items()
        for start in range(0, len(members), batch_size)
    ]


def _padded(bank: TaskBank, encodings: Sequence[Any], *, side: str | None, length: int | None = None) -> Any:
    names = [name for name in bank.tokenizer.model_input_names if name in encodings[0]]
    features = [{name: encoding[name] for name in names} for encoding in encodings]
    padding = True if length is None else "max_length"
    batch = bank.tokenizer.pad(features, padding, length, padding_side=side, return_tensors="pt")
    return batch.to(bank.device)


def _check(
    bank: TaskBank, texts: Sequence[Any], tasks: Sequence[Any], batch_size: int
) -> tuple[list[Any], list[str | None]]:
    if bank.tokenizer is None:
        raise TaskBankError("The bank has no tokenizer: make it with one, or pass encoded inputs to `bank(...)`.")
    if bank.tokenizer.pad_token is None:
        raise TaskBankError("The tokenizer has no padding token: set one (`tokenizer.pad_token = ...`).")
    if isinstance(texts, str) or isinstance(tasks, str):
        raise TaskBankError("`texts` and `tasks` are lists, one name per text.")
    if len(texts) != len(tasks):
        raise TaskBankError(f"There are {len(tasks)} task names for {len(texts)} texts; give one each.")
    if not len(texts):
        raise TaskBankError("There are no texts: pass at least one and its task.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise TaskBankError(f"`batch_size` is a positive number of texts, got {batch_size!r}.")
    for text in texts:
        pair = isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not (isinstance(text, str) or pair):
            raise TaskBankError(f"A text is a string or a pair of strings, got {text!r:.80}.")
    return list(texts), list(tasks)


def _check_kinds(bank: TaskBank, names: Iterable[str | None]) -> None:
    for name in names:
        kind = bank.kind_of(name)
        takes = kind.shell.main_input_name
        if kind.name.endswith("ForMultipleChoice"):
            takes = "several texts for each example"
        elif takes == "input_ids":
            continue
        raise TaskBankError(
            f"`predict` takes texts, and the task {name!r} is of a {kind.name}, which takes {takes}. Pass encoded "
            "inputs: `bank(**encoded, tasks=[...])`."
        )


def _encode(bank: TaskBank, number: int, text: str | Sequence[str], kind: str) -> Mapping[str, Any]:
    tokenizer = bank.tokenizer
    parts = (text,) if isinstance(text, str) else tuple(text)
    question = is_question(kind)
    longest = _longest(bank)
    if question:
        _check_question(tokenizer, number, parts, longest)
    encoding = tokenizer(
        *parts,
        truncation=("only_second" if question else True) if longest is not None else False,
        max_length=longest,
        return_offsets_mapping=tokenizer.is_fast,
        return_special_tokens_mask=True,
    )
    if not encoding["input_ids"]:
        raise TaskBankError(f"texts[{number}] ({text!r:.80}) has no tokens, so there is nothing to answer from.")
    if question and 1 not in encoding.sequence_ids():
        raise TaskBankError(f"The context of texts[{number}] ({text[1]!r:.80}) is empty: there is no answer in it.")
    return encoding


def is_question(kind: str) -> bool:
    """Whether a model class of this name answers questions from a context."""
    return kind.endswith(("ForQuestionAnswering", "ForQuestionAnsweringSimple"))


def _check_question(tokenizer: Any, number: int, parts: Sequence[str], longest: int | None) -> None:
    if not tokenizer.is_fast:
        raise TaskBankError("Answers are cut out of the text, which takes a fast tokenizer (`use_fast=True`).")
    if len(parts) != 2:
        raise TaskBankError(
            f"Question answering takes pairs `(question, context)`, got one text {parts[0]!r:.80} (texts[{number}])."
        )
    length = len(tokenizer(parts[0], add_special_tokens=False)["input_ids"])
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if longest is not None and length + special >= longest:
        raise TaskBankError(
            f"The question of texts[{number}] takes {length} tokens and {special} special ones, and the model takes "
            f"{longest} in all, so nothing of the context would be read. Shorten the question ({parts[0]!r:.80})."
        )


def _longest(bank: TaskBank) -> int | None:
    """How many tokens a text may have: what the tokenizer says, but no more than there are positions for."""
    own = bank.tokenizer.model_max_length
    if own > _NO_LIMIT:
        return bank.max_length
    return own if bank.num_positions is None else min(own, bank.num_positions)


def _decode(
    values: dict[str, Any], encoding: Any, text: str | Sequence[str], kind: str, labels: Labels | None
) -> Prediction:
    if "start_logits" in values:
        return _answer(values["start_logits"], values["end_logits"], encoding, text)
    logits = values.get("logits")
    if logits is not None and labels is not None:
        if kind.endswith("ForTokenClassification"):
            return _entities(logits, encoding, text, labels)
        if kind.endswith("ForSequenceClassification"):
            return _classification(logits, labels)
    return values


def _classification(logits: torch.Tensor, labels: Labels) -> dict[str, Any]:
    logits = logits.float()
    if labels.problem_type == "multi_label_classification":
        scores = logits.sigmoid()
    elif labels.problem_type == "regression" or (labels.num_labels == 1 and labels.problem_type is None):
        scores = logits
    else:
        scores = logits.softmax(-1)
    best = int(scores.argmax())
    named = {labels.id2label[index]: score for index, score in enumerate(scores.tolist())}
    return {"label": labels.id2label[best], "score": float(scores[best]), "scores": named}


def _entities(logits: torch.Tensor, encoding: Any, text: Any, labels: Labels) -> list[dict[str, Any]]:
    probabilities = logits.float().softmax(-1)
    parts = (text,) if isinstance(text, str) else tuple(text)
    found = []
    for index, row in enumerate(probabilities):
        if encoding["special_tokens_mask"][index]:
            continue
        best = int(row.argmax())
        entity: dict[str, Any] = {"entity": labels.id2label[best], "score": float(row[best]), "index": index}
        if "offset_mapping" in encoding:
            start, end = encoding["offset_mapping"][index]
            part = encoding.sequence_ids()[index] or 0
            entity |= {"word": parts[part][start:end], "start": start, "end": end}
        found.append(entity)
    return found


def _answer(start: torch.Tensor, end: torch.Tensor, encoding: Any, text: Any) -> dict[str, Any]:
    context = torch.tensor([part == 1 for part in encoding.sequence_ids()])
    # As in transformers' pipeline: probabilities over the context alone, and the likeliest span that runs forward.
    first, last = (logits.float().masked_fill(~context, -torch.inf).softmax(-1) for logits in (start, end))
    joint = (first[:, None] * last[None, :]).triu().tril(_LONGEST_ANSWER - 1)
    best = int(joint.argmax())
    begin, stop = divmod(best, joint.shape[1])
    offsets = encoding["offset_mapping"]
    place = (offsets[begin][0], offsets[stop][1])
    return {"answer": text[1][slice(*place)], "score": float(joint.max()), "start": place[0], "end": place[1]}
