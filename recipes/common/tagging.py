"""Sentences of tagged words: from the Hub, from JSON lines or from CoNLL-like files, and their labels on subwords."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from bitfit_hf.tables.encoding import encode_words

_RANGE_OR_EMPTY = re.compile(r"\d+[-.]\d+")  # ids of CoNLL-U lines that are no syntactic words: 1-2 and 8.1


def read_conll(path: str | Path, token_column: int, tag_column: int) -> Dataset:
    """
    Reads a file of one word per line, with an empty line after each sentence.

    Columns are separated by tabs where the file has any, by spaces else. Of a tab-separated file (CoNLL-U), comments,
    multiword tokens (`1-2`) and empty nodes (`8.1`) are left out; `-DOCSTART-` lines are left out everywhere.

    Args:
        path (`str` or `Path`): The file, in UTF-8.
        token_column (`int`), tag_column (`int`): Counted from 1.

    Returns:
        `Dataset`: With the columns `tokens` and `tags`, one row per sentence.

    Raises:
        `SystemExit`: A line has too few columns, or there is no word at all.
    """
    text = Path(path).read_text(encoding="utf-8")
    separator = "\t" if "\t" in text else None
    sentences: list[dict[str, list[str]]] = []
    words: list[tuple[str, str]] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if not line.strip():
            if words:
                sentences.append({"tokens": [token for token, _ in words], "tags": [tag for _, tag in words]})
                words = []
            continue
        columns = line.strip("\r\n").split(separator)
        if columns[0] == "-DOCSTART-":
            continue
        if separator and ((line.startswith("#") and len(columns) == 1) or _RANGE_OR_EMPTY.fullmatch(columns[0])):
            continue
        if len(columns) < max(token_column, tag_column):
            raise SystemExit(
                f"{path}, line {number}: {len(columns)} columns, but --token_column {token_column} and --tag_column "
                f"{tag_column} are asked for. Columns are counted from 1; here they are separated by "
                f"{'tabs' if separator else 'spaces'}."
            )
        words.append((columns[token_column - 1], columns[tag_column - 1]))
    if not sentences:
        raise SystemExit(f"{path} holds no words.")
    return Dataset.from_list(sentences)


def tagged(rows: Dataset, token_column: str, tag_column: str, skip_tag: str | None = None) -> Dataset:
    """
    Sentences in the columns `tokens` and `tags`, both of text.

    Args:
        rows (`Dataset`): With a list of words and a list of tags (text or class labels) in each row.
        token_column (`str`), tag_column (`str`): Their names.
        skip_tag (`str`, *optional*): Words with this tag are left out. In treebanks on the Hub `_` marks multiword
            tokens, whose parts follow as words of their own.

    Raises:
        `SystemExit`: No such column.
    """
    if missing := [name for name in (token_column, tag_column) if name not in rows.column_names]:
        raise SystemExit(f"The data has no column {' and no '.join(missing)}, only {', '.join(rows.column_names)}.")
    labels = getattr(rows.features[tag_column], "feature", None)

    def convert(row: dict[str, Any]) -> dict[str, list[str]]:
        tags = row[tag_column]
        names = labels.int2str(list(tags)) if isinstance(labels, ClassLabel) else [str(tag) for tag in tags]
        kept = [(token, name) for token, name in zip(row[token_column], names, strict=True) if name != skip_tag]
        return {"tokens": [token for token, _ in kept], "tags": [name for _, name in kept]}

    return rows.map(convert, remove_columns=rows.column_names, keep_in_memory=True)


def tag_names(splits: dict[str, Dataset]) -> list[str]:
    """All tags, in alphabetical order: those of every split, so that a model is asked for each, trained on or not."""
    return sorted({tag for rows in splits.values() for tags in rows["tags"] for tag in tags})


def on_subwords(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, names: list[str], max_length: int
) -> tuple[Dataset, int]:
    """
    Tokenizes sentences; the first subword of each word has its label, all other tokens have -100.

    Args:
        rows (`Dataset`): With the columns `tokens` and `tags`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast one, which knows what each subword is part of.
        names (`list[str]`): The tags, by label id.
        max_length (`int`): In subwords; what is beyond is cut.

    Returns:
        `tuple[Dataset, int]`: Rows for the model, and how many words have no token, since they were cut or the
        tokenizer made nothing of them.
    """
    ids = {name: number for number, name in enumerate(names)}
    labels = [[ids[tag] for tag in tags] for tags in rows["tags"]]
    made, lost = encode_words(rows["tokens"], labels, tokenizer, max_length)
    return Dataset.from_list(made), lost
