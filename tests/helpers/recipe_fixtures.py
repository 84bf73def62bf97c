"""A tiny base model and made-up data, in the schemas that the study recipes read.

The recipes are imported when a fixture is made: this file is read by every run of the tests.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = "cup pen key map hat box jar can bag pot".split()
PLACES = "table shelf floor bench".split()
TAGS = {"the": ("DET", "DT"), "is": ("AUX", "VBZ"), "on": ("ADP", "IN"), ".": ("PUNCT", ".")}
# Rows by split; the sizes differ so that one split cannot pass for another, and are no multiples of 2.
ROWS = {"train": 31, "validation": 13, "test": 11}


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes gzip-compressed JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def sentence(number: int) -> list[str]:
    return ["the", WORDS[number % 10], "is", "on", "the", PLACES[number % 4], "."]


def glue_rows(task: str, split: str, count: int) -> list[dict[str, Any]]:
    """Rows of a GLUE task. As on the Hub, the test split has the label -1."""
    from common.data import GLUE

    labels = len(GLUE[task].labels)
    rows = []
    for number in range(count):
        texts = {column: " ".join(sentence(number + 3 * i)) for i, column in enumerate(GLUE[task].columns)}
        label = -1 if split.startswith("test") else number % labels if labels else number % 6
        rows.append({**texts, "label": label if labels else float(label), "idx": number})
    return rows


def tagged_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(count):
        tags = [TAGS.get(word, ("NOUN", "NN")) for word in sentence(number)]
        rows.append({"tokens": sentence(number), "upos": [u for u, _ in tags], "xpos": [x for _, x in tags]})
    return rows


def conllu(count: int) -> str:
    """The same sentences as a CoNLL-U file, each with a comment, a multiword token and an empty node."""
    text = ""
    for number, row in enumerate(tagged_rows(count)):
        text += f"# sent_id = {number}\n1-2\t{''.join(row['tokens'][:2])}{'	_' * 8}\n"
        for index, word in enumerate(row["tokens"], start=1):
            text += (
                "\t".join([str(index), word, word, row["upos"][index - 1], row["xpos"][index - 1], *"_____"]) + "\n"
            )
        text += "7.1\tempty" + "\t_" * 8 + "\n\n"
    return text


@pytest.fixture(scope="session")
def study_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer BERT with MiniLM's tokenizer, as a local checkpoint of the backbone."""
    import quickstart
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("study") / "tiny-bert"
    tokenizer = AutoTokenizer.from_pretrained(quickstart.demo_model())
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))
    torch.nn.init.normal_(model.pooler.dense.bias, std=0.02)  # a trained pooler's is not zero
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def study_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up data of all recipes: GLUE with test splits and diagnostic set, tagged sentences, questions, texts."""
    from common.data import GLUE

    folder = tmp_path_factory.mktemp("study-data")
    for task, spec in GLUE.items():
        for kind, count in ROWS.items():
            for split in ("train",) if kind == "train" else spec.splits(kind):
                write_lines(folder / "glue" / task / f"{split}.jsonl.gz", glue_rows(task, split, count))
    write_lines(folder / "glue" / "ax" / "test.jsonl.gz", glue_rows("mnli", "test", 9))
    for kind, count in ROWS.items():
        name = "dev" if kind == "validation" else kind
        write_lines(folder / "ud_ewt" / f"{name}.jsonl.gz", tagged_rows(count))
        write_lines(
            folder / f"{kind}.jsonl.gz",
            ({"tokens": row["tokens"], "pos_tags": row["xpos"]} for row in tagged_rows(count)),
        )
        (folder / f"{name}.conllu").write_text(conllu(count), encoding="utf-8")
        if kind != "test":
            write_lines(folder / "squad" / f"{kind}.jsonl.gz", questions(count))
            texts = [" ".join(sentence(number)) for number in range(3 * count)]
            write_lines(folder / "texts" / f"{kind}.jsonl.gz", ({"text": text} for text in texts))
    return folder


def questions(count: int) -> list[dict[str, Any]]:
    """Rows in the columns of SQuAD v1.1."""
    rows = []
    for number in range(count):
        thing, place = WORDS[number % 10], PLACES[number % 4]
        context = f"The {thing} is on the {place}. Nobody knows who has put it there."
        answers = {"text": [f"on the {place}"], "answer_start": [context.index(f"on the {place}")]}
        question = f"Where is the {thing}?"
        rows.append({"id": f"q{number}", "title": thing, "context": context, "question": question, "answers": answers})
    return rows


@pytest.fixture(scope="session")
def study_decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer Qwen2, which has biases in some projections and none in others."""
    import quickstart
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("study") / "tiny-qwen"
    tokenizer = AutoTokenizer.from_pretrained(quickstart.demo_model())
    tokenizer.eos_token = "[SEP]"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), intermediate_size=32, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
