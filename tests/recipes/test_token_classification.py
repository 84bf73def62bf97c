"""The tagging recipe on a tiny model and made-up sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import token_classification
import torch
from common.record import RunRecord
from common.tagging import on_subwords, read_conll, tag_names, tagged
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from recipe_fixtures import ROWS, conllu, tagged_rows
from transformers import AutoModelForTokenClassification, AutoTokenizer

from bitfit_hf import BiasDelta
from bitfit_hf.tables.encoding import IGNORED

TINY = ["--epochs", "2", "--batch_size", "8", "--learning_rate", "0.05"]
UPOS = ["ADP", "AUX", "DET", "NOUN", "PUNCT"]


def run(study_base: str, folder: Path, *options: str) -> RunRecord:
    places = ["--model_name_or_path", study_base, "--output_dir", str(folder)]
    return token_classification.main([*places, *TINY, *options])


@pytest.fixture(scope="module")
def tokenizer(study_base):
    return AutoTokenizer.from_pretrained(study_base)


# --- files -----------------------------------------------------------------------------------------------------------


def test_conllu_files_without_comments_multiword_tokens_and_empty_nodes(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text(conllu(3).rstrip("\n"))  # the last sentence ends with the file
    assert read_conll(path, 2, 4)["tokens"][:] == [row["tokens"] for row in tagged_rows(3)]
    assert read_conll(path, 2, 4)["tags"][:] == [row["upos"] for row in tagged_rows(3)]
    assert read_conll(path, 2, 5)["tags"][:] == [row["xpos"] for row in tagged_rows(3)]


def test_columns_separated_by_spaces(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("-DOCSTART- -X- O\n\nEU NNP B-ORG\n# # O\n1.5 CD O\n\n\n. . O\n", encoding="utf-8")
    rows = read_conll(path, 1, 3)
    assert rows["tokens"][:] == [["EU", "#", "1.5"], ["."]]  # no comment and no empty node: there are no tabs
    assert rows["tags"][:] == [["B-ORG", "O", "O"], ["O"]]


def test_a_line_with_too_few_columns_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a X\nb\n")
    with pytest.raises(
        SystemExit, match=r"a\.txt, line 2: 1 columns, but --token_column 1 and --tag_column 2 .*spaces"
    ):
        read_conll(path, 1, 2)
    path.write_text("\n\n")
    with pytest.raises(SystemExit, match="holds no words"):
        read_conll(path, 1, 2)


def test_class_labels_become_names_and_skipped_words_are_left_out():
    features = Features({"words": Sequence(Value("string")), "pos": Sequence(ClassLabel(names=["_", "X", "Y"]))})
    rows = Dataset.from_dict({"words": [["don't", "do", "n't"], ["a"]], "pos": [[0, 1, 2], [2]]}, features=features)
    made = tagged(rows, "words", "pos", skip_tag="_")
    assert made["tokens"][:] == [["do", "n't"], ["a"]]
    assert made["tags"][:] == [["X", "Y"], ["Y"]]
    assert made.column_names == ["tokens", "tags"]
    with pytest.raises(SystemExit, match="no column upos, only words, pos"):
        tagged(rows, "words", "upos")


def test_tags_of_all_splits_have_a_label():
    one, two = (Dataset.from_dict({"tokens": [["a"]], "tags": [[tag]]}) for tag in ("Z", "B"))
    assert tag_names({"train": one, "test": two}) == ["B", "Z"]


# --- subwords --------------------------------------------------------------------------------------------------------


def test_the_first_subword_of_a_word_carries_its_label(tokenizer):
    rows = Dataset.from_dict({"tokens": [["unbelievably", "good"], ["a"]], "tags": [["ADV", "ADJ"], ["DET"]]})
    made, lost = on_subwords(rows, tokenizer, ["ADJ", "ADV", "DET"], 512)
    assert lost == 0
    pieces = tokenizer.convert_ids_to_tokens(made["input_ids"][0])
    assert len(pieces) > 4, "the long word was to be several subwords"
    expected = [IGNORED] * len(pieces)
    expected[1], expected[pieces.index("good")] = 1, 0
    assert made["labels"][0] == expected
    assert made["labels"][1] == [IGNORED, 2, IGNORED]


def test_words_that_were_cut_or_vanish_are_counted(tokenizer):
    rows = Dataset.from_dict({"tokens": [["a", "b", "c", "d"], ["a", "\x08"]], "tags": [["X"] * 4, ["X"] * 2]})
    made, lost = on_subwords(rows, tokenizer, ["X"], max_length=4)
    assert lost == 3  # c and d, and a control character that the tokenizer drops
    assert sum(label != IGNORED for labels in made["labels"] for label in labels) == 3


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_tagging_end_to_end(study_base, study_data, tmp_path, tokenizer, capsys):
    record = run(
        study_base, tmp_path, "--data_dir", str(study_data), "--train_metrics", "9", "--learning_rate", "0.02"
    )
    assert RunRecord.read(tmp_path / "run.json") == record
    assert (record.recipe, record.task, record.metric) == ("token_classification", "upos", "accuracy")
    assert record.data == {"source": "local files", "rows": {"train": ROWS["train"], "validation": ROWS["validation"]}}
    assert record.notes["tags"] == 5
    assert record.notes["words"] == {split: 7 * count for split, count in ROWS.items()}
    assert record.notes["words_without_token"] == dict.fromkeys(ROWS, 0)
    assert len(record.history) == 2
    assert "train" in record.history[0]
    assert record.metrics["final"]["loss"] < record.history[0]["eval"]["loss"] < 1.7  # chance is log 5 = 1.6
    assert "upos, bitfit" in capsys.readouterr().out

    model = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert list(model.config.id2label.values()) == UPOS
    assert BiasDelta.from_pretrained(tmp_path).num_parameters() == record.trainable["body"]
    right = {"validation": 0, "test": 0}
    for split in right:
        for row in tagged_rows(ROWS[split]):
            batch = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
            with torch.no_grad():
                answers = model(**batch).logits[0].argmax(-1)
            words = batch.word_ids()
            right[split] += sum(
                model.config.id2label[int(answers[words.index(word)])] == tag for word, tag in enumerate(row["upos"])
            )
    assert right["validation"] / (7 * ROWS["validation"]) == pytest.approx(record.metrics["final"]["accuracy"])
    assert right["test"] / (7 * ROWS["test"]) == pytest.approx(record.notes["test"]["accuracy"])


def test_words_that_were_cut_count_as_wrong(study_base, study_data, tmp_path):
    record = run(study_base, tmp_path, "--data_dir", str(study_data), "--max_length", "5", "--epochs", "1")
    lost = record.notes["words_without_token"]
    assert lost == {split: 4 * count for split, count in ROWS.items()}  # three of seven words have a token
    assert record.metrics["best"]["accuracy"] <= 3 / 7
    assert record.notes["test"]["accuracy"] <= 3 / 7


def test_penn_tags_from_conll_files_equal_those_of_the_rows(study_base, study_data, tmp_path):
    columns = ["--token_column", "2", "--tag_column", "5"]
    files = [
        f"--{split}_file={study_data / name}.conllu" for split, name in (("train", "train"), ("validation", "dev"))
    ]
    from_files = run(study_base, tmp_path / "files", *files, *columns, "--method", "frozen")
    rows = ["--data_dir", str(study_data), "--tag_column", "xpos"]
    from_rows = run(study_base, tmp_path / "rows", *rows, "--method", "frozen")
    histories = [
        [{name: value for name, value in entry.items() if not name.endswith("seconds")} for entry in record.history]
        for record in (from_files, from_rows)
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 2
    assert (from_files.task, from_rows.task) == ("column 5", "xpos")
    assert "test" not in from_files.notes
    assert from_files.config["train_file"] == "<local path>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_file", "a.conllu"], "--train_file and --validation_file go together"),
        (["--validation_file", "a", "--train_file", "b"], "in CoNLL-U words are 2, UPOS tags 4 and XPOS tags 5"),
        (["--data_dir", "nowhere"], r"no train\.jsonl\.gz"),
    ],
)
def test_what_is_missing_is_an_error_before_any_work(options, message):
    with pytest.raises(SystemExit, match=message):
        token_classification.main(options)


def test_data_without_a_validation_split(study_base, tmp_path):
    from recipe_fixtures import write_lines

    write_lines(tmp_path / "train.jsonl.gz", tagged_rows(4))
    with pytest.raises(SystemExit, match=r"no validation .* split, only train"):
        run(study_base, tmp_path / "out", "--data_dir", str(tmp_path))
