"""Texts in, labels and scores out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from tqdm.auto import tqdm

from ..errors import TaskBankError
from ..terms.tasks import (
    FEATURE_EXTRACTION,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    Task,
)
from ..tuner.head import Labels
from .padding import Padding
from .store import BankTask
from .task_models import TaskModel
from .texts import TextEncoder

Prediction: TypeAlias = dict[str, Any] | list[dict[str, Any]]

_SAMPLE = ("Who is it?", "We are.")
_LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class TextTask:
    """A task of a bank, or its base, that answers texts.

    Args:
        name (`str`, *optional*): The task's; `None` is the base.
        model ([`TaskModel`]): What it runs through.
        labels ([`Labels`], *optional*): Its labels.
        padding ([`Padding`]): What padding does to its answers.
        entry ([`BankTask`], *optional*): The bank's entry that these were read from.
    """

    name: str | None
    model: TaskModel
    labels: Labels | None
    padding: Padding
    entry: BankTask | None

    @property
    def question(self) -> bool:
        """Whether its texts are questions with their contexts."""
        return self.model.task is QUESTION_ANSWERING

    @property
    def kind(self) -> Task:
        """What it answers: one of the tasks with a head for texts, or features."""
        known = (SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, QUESTION_ANSWERING)
        return self.model.task if self.model.task in known else FEATURE_EXTRACTION  # type: ignore[return-value]

    @classmethod
    def of(
        cls,
        name: str | None,
        model: TaskModel,
        labels: Labels | None,
        entry: BankTask | None,
        *,
        encoder: TextEncoder,
        run: Callable[..., Sequence[Mapping[str, Any]]],
    ) -> TextTask:
        """Finds out what there is to know; the first task of a model class is tried on a short text.

        Args:
            name (`str`, *optional*), model ([`TaskModel`]), labels ([`Labels`], *optional*),
            entry ([`BankTask`], *optional*): As above.
            encoder ([`TextEncoder`]): Makes the inputs of the bank's base.
            run (`Callable`): The bank: answers an encoded batch, given `tasks`.

        Raises:
            [`TaskBankError`]: It takes something else than texts.
        """
        _check_takes_text(name, model)
        return cls(name, model, labels, _padding(name, model, encoder, run), entry)


@dataclass(frozen=True)
class EncodedText:
    """A text that is ready to run, see [`TaskBank.encode`].

    Args:
        text (`str` or `Sequence[str]`): The text, or a pair.
        task ([`TextTask`]): Its task.
        encoding (`BatchEncoding`): Its tokens.
    """

    text: str | Sequence[str]
    task: TextTask
    encoding: Any

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.encoding["input_ids"])

    @property
    def runs_with(self) -> tuple[str | None, int]:
        """Texts for which this is equal may run in one batch: the side of padding, or the length where none fits."""
        side = self.task.padding.side
        return side, 0 if side else self.length

    def prediction(self, values: dict[str, Any], *, raw_scores: bool = False) -> Prediction:
        """What [`TaskBank.predict`] gives for it.

        Args:
            values (`dict[str, Any]`): The model's answer to it, see [`TaskBank.run`].
            raw_scores (`bool`, *optional*, defaults to `False`):
                Gives the logits of a sequence classification as they are, instead of probabilities.
        """
        if "start_logits" in values:
            return _answer(values["start_logits"], values["end_logits"], self.encoding, self.text)
        logits, labels = values.get("logits"), self.task.labels
        if logits is not None and labels is not None:
            if self.task.kind is TOKEN_CLASSIFICATION:
                return _entities(logits, self.encoding, self.text, labels)
            if self.task.kind is SEQUENCE_CLASSIFICATION:
                return _classification(logits, labels, raw_scores)
        return values


def run_together(
    texts: Sequence[EncodedText], *, encoder: TextEncoder, run: Callable[..., Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """One forward pass; the answer to each text without what stands for padding. See [`TaskBank.run`]."""
    ((side, _),) = {text.runs_with for text in texts}
    batch = encoder.padded([text.encoding for text in texts], side=side)
    output = run(**batch, tasks=[text.task.name for text in texts])
    return [text.task.padding.cut(answer, text.length) for text, answer in zip(texts, output, strict=True)]


def predict(
    texts: Sequence[EncodedText],
    *,
    run: Callable[[Sequence[EncodedText]], list[dict[str, Any]]],
    batch_size: int,
    progress: bool,
) -> list[Prediction]:
    """See [`TaskBank.predict`].

    Args:
        texts (`Sequence[EncodedText]`): The texts.
        run (`Callable`): Runs some of them together.
        batch_size (`int`), progress (`bool`): As there.
    """
    answers: list[Prediction] = [{} for _ in texts]
    batches = _batches(texts, batch_size)
    for chosen in tqdm(batches, desc="predict", unit="batch", disable=not progress):
        for values, i in zip(run([texts[i] for i in chosen]), chosen, strict=True):
            answers[i] = texts[i].prediction(values)
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


def _batches(texts: Sequence[EncodedText], batch_size: int) -> list[list[int]]:
    """Which texts run together."""
    groups: dict[tuple[str | None, int], list[int]] = {}
    # The longest first: memory is sufficient for all that follow, and what is left of the time is shown truly.
    for i in sorted(range(len(texts)), key=lambda i: -texts[i].length):
        groups.setdefault(texts[i].runs_with, []).append(i)
    return [
        numbers[start : start + batch_size]
        for numbers in groups.values()
        for start in range(0, len(numbers), batch_size)
    ]


def _classification(logits: torch.Tensor, labels: Labels, raw_scores: bool) -> dict[str, Any]:
    logits = logits.float()
    if raw_scores:
        scores = logits
    elif labels.problem_type == "multi_label_classification":
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
