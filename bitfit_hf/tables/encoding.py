"""Texts as the tokens of a model, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import TableError
from .examples import Examples
from .problem import Kind, Problem

IGNORED = -100  # the label that the loss leaves out

# What a tokenizer without a limit of its own says is a huge number. Most encoders end at 512 tokens.
LONGEST = 512


class EncodedRows(Sequence[dict[str, Any]]):
    """
    What a Trainer takes as a data set.

    Args:
        rows (`list[dict[str, Any]]`): Of token ids and labels.
        hub (`datasets.Dataset`, *optional*): Where on the Hub they are from, which the model card then says.
    """

    def __init__(self, rows: list[dict[str, Any]], hub: Any = None) -> None:
        self.rows = rows
        self.info, self.split = getattr(hub, "info", None), getattr(hub, "split", None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]


@dataclass
class Encoded:
    """
    Encoded examples.

    Args:
        rows ([`EncodedRows`]): For a Trainer.
        cut (`int`): How many texts were longer than the limit.
        lost_words (`int`): Words of a token classification that have no token, since their text was cut.
    """

    rows: EncodedRows
    cut: int
    lost_words: int = 0


def longest_input(tokenizer: PreTrainedTokenizerBase, config: Any, wanted: int | None = None) -> int:
    """How many tokens a text may have: as the user wants, and as model and tokenizer allow.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the base.
        config ([`~transformers.PretrainedConfig`]): Of the base.
        wanted (`int`, *optional*): As the user says.
    """
    positions = getattr(config, "max_position_embeddings", None)
    limits = [tokenizer.model_max_length, wanted or LONGEST]
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    return int(min(limits))


def encode(
    examples: Examples, problem: Problem, tokenizer: PreTrainedTokenizerBase, max_length: int, *, hub: Any = None
) -> Encoded:
    """Encodes examples.

    Args:
        examples ([`Examples`]): Texts and labels.
        problem ([`Problem`]): The task.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the base. For a token classification a fast one.
        max_length (`int`): In tokens; what is beyond is cut.
        hub (`datasets.Dataset`, *optional*): Where on the Hub the rows are from.

    Raises:
        [`TableError`]: The tokenizer cannot say which token belongs to which word.
    """
    if problem.kind is Kind.TOKENS:
        rows, lost = encode_words(examples.texts, examples.labels, tokenizer, max_length)
        cut = sum(len(row["input_ids"]) >= max_length for row in rows) if lost else 0
        return Encoded(EncodedRows(rows, hub), cut, lost)
    columns = [list(column) for column in zip(*examples.texts)]
    made = tokenizer(*columns, truncation=False, verbose=False)
    cut = sum(len(ids) > max_length for ids in made["input_ids"])
    if cut:
        made = tokenizer(*columns, truncation=True, max_length=max_length)
    rows = [{name: values[i] for name, values in made.items()} for i in range(len(examples))]
    for row, label in zip(rows, examples.labels):
        row["labels"] = label
    return Encoded(EncodedRows(rows, hub), cut)


def encode_words(
    sentences: Sequence[Sequence[str]],
    labels: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[list[dict[str, Any]], int]:
    """Encodes sentences of words; the first token of each word has its label, all other tokens have [`IGNORED`].

    Args:
        sentences (`Sequence[Sequence[str]]`): Words.
        labels (`Sequence[Sequence[int]]`): A label's id for each word.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast one, which knows what each token is part of.
        max_length (`int`): In tokens; what is beyond is cut.

    Returns:
        `tuple[list[dict[str, Any]], int]`: Rows for the model, and how many words have no token, since they were cut
        or the tokenizer made nothing of them.

    Raises:
        [`TableError`]: The tokenizer is a slow one.
    """
    if not tokenizer.is_fast:
        raise TableError(
            f"{type(tokenizer).__name__} does not say which token belongs to which word, so words cannot be labelled "
            "with it. Take a base with a fast tokenizer (`tokenizer.json`)."
        )
    made = tokenizer(
        [list(words) for words in sentences], is_split_into_words=True, truncation=True, max_length=max_length
    )
    rows, lost = [], 0
    for index, tags in enumerate(labels):
        of_words = made.word_ids(index)
        first = [word is not None and word != previous for word, previous in zip(of_words, [None, *of_words])]
        row: dict[str, Any] = {name: values[index] for name, values in made.items()}
        row["labels"] = [tags[word] if yes and word is not None else IGNORED for word, yes in zip(of_words, first)]
        rows.append(row)
        lost += len(tags) - sum(first)
    return rows, lost
