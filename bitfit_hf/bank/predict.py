"""Texts in, labels and scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tqdm.auto import tqdm

from ..errors import TaskBankError
from ..tuner.head import Labels

if TYPE_CHECKING:
    from .bank import TaskBank

Prediction: TypeAlias = dict[str, Any] | list[dict[str, Any]]

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
    encodings = [_encode(bank, text, described[name][0]) for text, name in zip(texts, tasks, strict=True)]
    # The longest first: memory is sufficient for all that follow, and what is left of the time is shown truly.
    order = sorted(range(len(texts)), key=lambda i: -len(encodings[i]["input_ids"]))
    answers: list[Prediction] = [{} for _ in texts]
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="predict", unit="batch", disable=not progress):
        chosen = order[start : start + batch_size]
        features = [
            {name: encodings[i][name] for name in bank.tokenizer.model_input_names if name in encodings[i]}
            for i in chosen
        ]
        batch = bank.tokenizer.pad(features, return_tensors="pt").to(bank.device)
        output = bank(**batch, tasks=[tasks[i] for i in chosen])
        for row, i in enumerate(chosen):
            mask = batch["attention_mask"][row].bool().cpu()
            values = {name: _unpadded(value, mask) for name, value in output[row].items()}
            answers[i] = _decode(values, encodings[i], texts[i], *described[tasks[i]])
    return answers


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


def _encode(bank: TaskBank, text: str | Sequence[str], kind: str) -> Mapping[str, Any]:
    tokenizer = bank.tokenizer
    parts = (text,) if isinstance(text, str) else tuple(text)
    question = kind.endswith(("ForQuestionAnswering", "ForQuestionAnsweringSimple"))
    if question and len(parts) != 2:
        raise TaskBankError(f"Question answering takes pairs `(question, context)`, got one text {text!r:.80}.")
    longest = tokenizer.model_max_length
    if longest > _NO_LIMIT:
        longest = bank.max_length
    return tokenizer(
        *parts,
        truncation=("only_second" if question else True) if longest is not None else False,
        max_length=longest,
        return_offsets_mapping=tokenizer.is_fast,
        return_special_tokens_mask=True,
    )


def _unpadded(value: Any, mask: torch.Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_unpadded(item, mask) for item in value)
    value = value.cpu()
    return value[mask] if value.dim() and value.shape[0] == len(mask) else value


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
    if "offset_mapping" not in encoding:
        raise TaskBankError("Answers are cut out of the text, which takes a fast tokenizer (`use_fast=True`).")
    context = torch.tensor([part == 1 for part in encoding.sequence_ids()])
    # As in transformers' pipeline: probabilities over the context alone, and the likeliest span that runs forward.
    first, last = (logits.float().masked_fill(~context, -torch.inf).softmax(-1) for logits in (start, end))
    joint = (first[:, None] * last[None, :]).triu().tril(_LONGEST_ANSWER - 1)
    best = int(joint.argmax())
    begin, stop = divmod(best, joint.shape[1])
    offsets = encoding["offset_mapping"]
    place = (offsets[begin][0], offsets[stop][1])
    return {"answer": text[1][slice(*place)], "score": float(joint.max()), "start": place[0], "end": place[1]}
