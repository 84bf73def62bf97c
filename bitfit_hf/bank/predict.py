"""Texts in, labels and scores out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from tqdm.auto import tqdm

from ..errors import TaskBankError
from ..terms.tasks import MULTIPLE_CHOICE, QUESTION_ANSWERING, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, Task
from ..tuner.head import Labels
from .padding import Padding
from .task_models import TaskModel
from .texts import TextEncoder

Prediction: TypeAlias = dict[str, Any] | list[dict[str, Any]]

_SAMPLE = ("Who is it?", "We are.")
_LONGEST_ANSWER = 30  # tokens


def predict(
    texts: Sequence[str | Sequence[str]],
    tasks: Sequence[str | None],
    models: Mapping[str | None, tuple[TaskModel, Labels | None]],
    *,
    encoder: TextEncoder,
    run: Callable[..., Sequence[Mapping[str, Any]]],
    batch_size: int,
    progress: bool,
) -> list[Prediction]:
    """See [`TaskBank.predict`].

    Args:
        texts (`Sequence[str]`), tasks (`Sequence[str]`): As many texts as task names.
        models (`Mapping`): Model and labels of each task that is named.
        encoder ([`TextEncoder`]): Makes the inputs of the bank's base.
        run (`Callable`): The bank: answers an encoded batch, given `tasks`.
        batch_size (`int`), progress (`bool`): As there.
    """
    for name, (model, _) in models.items():
        _check_takes_text(name, model)
    paddings = {name: _padding(name, model, encoder, run) for name, (model, _) in models.items()}
    encodings = [
        encoder.encode(number, text, question=models[name][0].task is QUESTION_ANSWERING)
        for number, (text, name) in enumerate(zip(texts, tasks, strict=True))
    ]
    answers: list[Prediction] = [{} for _ in texts]
    lengths = [len(encoding["input_ids"]) for encoding in encodings]
    batches = _batches([paddings[name].side for name in tasks], lengths, batch_size)
    for side, chosen in tqdm(batches, desc="predict", unit="batch", disable=not progress):
        batch = encoder.padded([encodings[i] for i in chosen], side=side)
        output = run(**batch, tasks=[tasks[i] for i in chosen])
        for answer, i in zip(output, chosen, strict=True):
            model, labels = models[tasks[i]]
            values = paddings[tasks[i]].cut(answer, lengths[i])
            answers[i] = _decode(values, encodings[i], texts[i], model.task, labels)
    return answers


def _check_takes_text(name: str | None, model: TaskModel) -> None:
    takes = model.model.main_input_name
    if model.task is MULTIPLE_CHOICE:
        takes = "several texts for each example"
    elif takes == "input_ids":
        return
    raise TaskBankError(
        f"`predict` takes texts, and the task {name!r} is of a {model.name}, which takes {takes}. Pass encoded "
        "inputs: `bank(**encoded, tasks=[...])`."
    )


def _padding(name: str | None, model: TaskModel, encoder: TextEncoder, run: Callable[..., Any]) -> Padding:
    """What padding does to the answers of a task; tried once for each task model."""
    if model.padding is None:
        question = model.task is QUESTION_ANSWERING
        encoding = encoder.encode(0, _SAMPLE if question else _SAMPLE[0], question=question)

        def answer(length: int | None, side: str | None) -> Mapping[str, Any]:
            return run(**encoder.padded([encoding], side=side, length=length), tasks=[name])[0]

        preferred, length = encoder.tokenizer.padding_side, len(encoding["input_ids"])
        model.padding = Padding.of(answer, length, preferred=preferred, room=encoder.longest)
    return model.padding


def _batches(
    sides: Sequence[str | None], lengths: Sequence[int], batch_size: int
) -> list[tuple[str | None, list[int]]]:
    """Which texts run together, padded on which side."""
    groups: dict[tuple[str | None, int], list[int]] = {}
    # The longest first: memory is sufficient for all that follow, and what is left of the time is shown truly.
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        groups.setdefault((sides[i], 0 if sides[i] else lengths[i]), []).append(i)
    return [
        (side, numbers[start : start + batch_size])
        for (side, _), numbers in groups.items()
        for start in range(0, len(numbers), batch_size)
    ]


def _decode(
    values: dict[str, Any], encoding: Any, text: str | Sequence[str], task: Task | None, labels: Labels | None
) -> Prediction:
    if "start_logits" in values:
        return _answer(values["start_logits"], values["end_logits"], encoding, text)
    logits = values.get("logits")
    if logits is not None and labels is not None:
        if task is TOKEN_CLASSIFICATION:
            return _entities(logits, encoding, text, labels)
        if task is SEQUENCE_CLASSIFICATION:
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
