"""Tables of labelled texts: reading, checking, kinds of tasks, the split, tokens, metrics. No model is needed."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bank_tester import tokenizer

from bitfit_hf.errors import TableError
from bitfit_hf.tables import delimited
from bitfit_hf.tables.columns import Columns, find_columns
from bitfit_hf.tables.encoding import IGNORED, encode
from bitfit_hf.tables.examples import Examples, complete_rows, to_examples
from bitfit_hf.tables.metrics import (
    Answers,
    constant_answer,
    constant_scores,
    correlations,
    label_scores,
    main_metric,
    metric_names,
    scores,
)
from bitfit_hf.tables.problem import Kind, Problem, find_problem
from bitfit_hf.tables.reading import Source, read_file, read_one, read_tables
from bitfit_hf.tables.spans import entities, entity_scores
from bitfit_hf.tables.split import MOST_EVALUATION_ROWS, split_rows
from bitfit_hf.tables.table import Table

Write = Callable[[str, "str | bytes"], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def table(rows: list[dict[str, Any]], **values: Any) -> Table:
    return Table("t.csv", list(rows[0]), rows, list(range(2, len(rows) + 2)), unit="line", **values)


def labelled(labels: list[Any], text: Any = "a b") -> Table:
    return table([{"text": text, "label": label} for label in labels])


TWO = Columns("text", None, ("label",))


def problem_of(made: Table, kind: Kind | None = None, columns: Columns = TWO, **values: Any) -> Problem:
    return find_problem([made], columns, kind, **values)


# --- reading ---------------------------------------------------------------------------------------------------------

ROWS = [{"text": 'a, "b"\nc', "label": "yes"}, {"text": "ü", "label": "no"}]
CSV = 'text,label\n"a, ""b""\nc",yes\nü,no\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", CSV),
        ("t.CSV", CSV.replace("\n", "\r\n").replace('""b""\r\n', '""b""\n')),
        ("t.csv", "﻿" + CSV),
        ("utf16.csv", CSV.encode("utf-16")),
        ("t.csv.gz", gzip.compress(CSV.encode())),
        ("t.csv", CSV.replace(",", ";").replace("a; ", "a, ")),
        ("t.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("t.json", json.dumps(ROWS)),
    ],
    ids=["csv", "CRLF", "byte order mark", "UTF-16", "gzip", "semicolons", "jsonl", "json"],
)
def test_a_table_is_the_same_in_every_format(write: Write, name: str, content: str | bytes) -> None:
    found = read_file(write(name, content))
    assert found.rows == ROWS
    assert found.columns == ["text", "label"]


def test_rows_know_their_lines(write: Write) -> None:
    found = read_file(write("t.csv", CSV + "\n\nlast,no\n"))
    assert [found.place(i) for i in range(3)] == ["t.csv, line 2", "t.csv, line 4", "t.csv, line 7"]
    assert found.select([2]).place(0) == "t.csv, line 7"
    assert read_file(write("t.json", json.dumps(ROWS))).place(1) == "t.json, row 2"


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    assert read_file(tmp_path / "t.parquet").rows == ROWS
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(TableError, match=r"bad\.parquet cannot be read"):
        read_file(tmp_path / "bad.parquet")


def test_tabs_with_and_without_quotation_marks(write: Write) -> None:
    quoted = read_file(write("q.tsv", 't\tl\n"he said ""hi"""\t1\n'))
    assert quoted.rows == [{"t": 'he said "hi"', "l": "1"}]
    # As GLUE writes them: marks are text, and one alone does not swallow the next line.
    plain = read_file(write("p.tsv", 't\tl\n"open\t1\nclose"\t0\n'))
    assert plain.rows == [{"t": '"open', "l": "1"}, {"t": 'close"', "l": "0"}]


def test_a_folder_and_its_splits(write: Write, tmp_path: Path) -> None:
    write("train.csv", CSV)
    write("dev.csv", "text,label\nz,no\n")
    train, other = read_tables(Source(str(tmp_path)))
    assert other is not None
    assert (len(train), other.rows) == (2, [{"text": "z", "label": "no"}])
    assert read_one(Source(str(tmp_path))).name == "dev.csv"
    with pytest.raises(TableError, match="no split 'test', only dev, train"):
        read_one(Source(str(tmp_path)), split="test")


def test_a_long_text_is_no_error(write: Write) -> None:
    assert len(read_file(write("t.csv", "text,label\n" + "x" * 200_000 + ",1\n")).rows[0]["text"]) == 200_000


BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("t.csv", "", r"t\.csv is empty"),
    "header alone": ("t.csv", "text,label\n", "has a header and no rows"),
    "ragged": ("t.csv", "text,label\na,1\n\nb,c,1\n", r"line 4: 3 values, but the header has 2 columns"),
    "short": ("t.csv", "text,label\na\n", r"line 2: 1 values, but the header has 2"),
    "open quotation mark": ("t.csv", 'text,label\na,1\n"b,1\n', r"line 3: the row cannot be read"),
    "header twice": ("t.csv", "text,label,text\na,1,b\n", r'header names "text" more than once'),
    "latin-1": ("t.csv", "text,label\nok,1\ncafé,1\n".encode("latin-1"), r"line 3: byte 0xe9 is no UTF-8.*--encoding"),
    "no JSON": ("t.jsonl", '{"a": 1}\n{"a": \n', r"t\.jsonl, line 2: this is no JSON"),
    "no object": ("t.jsonl", '{"a": 1}\n[1, 2]\n', r"line 2: \[1, 2\] is no object"),
    "no rows": ("t.json", "[]", "has no rows"),
    "not packed": ("t.csv.gz", b"text,label\n", "cannot be read"),
    "other kind": ("t.xlsx", "", "is no table that can be read"),
}


@pytest.mark.parametrize("mistake", BAD_FILES)
def test_a_bad_file_is_one_sentence_with_its_line(write: Write, mistake: str) -> None:
    name, content, match = BAD_FILES[mistake]
    with pytest.raises(TableError, match=match):
        read_file(write(name, content))


@pytest.mark.parametrize("name", ["nowhere.csv", "./nowhere", "/no/where", "a/b/c"])
def test_what_looks_like_a_file_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(TableError, match="There is no file"):
        read_tables(Source(name))


def test_the_other_encoding(write: Write) -> None:
    path = write("t.csv", "text,label\ncafé,1\n".encode("latin-1"))
    assert read_file(path, encoding="latin-1").rows[0]["text"] == "café"
    with pytest.raises(TableError, match="none that Python knows"):
        read_file(path, encoding="klingon")


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["id", "Text", "label"], Columns("Text", None, ("label",))),
        (["sentence1", "sentence2", "idx", "label"], Columns("sentence1", "sentence2", ("label",))),
        (["tokens", "ner_tags"], Columns("tokens", None, ("ner_tags",))),
        (["review", "happy"], Columns("review", None, ("happy",))),
    ],
)
def test_columns_are_found_by_their_names(names: list[str], expected: Columns) -> None:
    assert find_columns(Table("t.csv", names, [], [])) == expected


@pytest.mark.parametrize(
    ("names", "given", "match"),
    [
        (["a", "b"], {}, r"--text: \"a\", \"b\""),
        (["text", "b", "c"], {}, r"--label: \"b\", \"c\""),
        (["text"], {}, "there is no other column"),
        (["text", "label"], {"text": "txt"}, r"no column \"txt\" \(--text\), only"),
        (["Text", "label"], {"text": "text"}, r"Did you mean \"Text\"\?"),
        (["text", "label"], {"text": "text", "labels": ["text"]}, "two things at once"),
        (["a", "b", "label"], {"text2": "b"}, "name the first with --text"),
    ],
)
def test_columns_that_are_not_there(names: list[str], given: dict[str, Any], match: str) -> None:
    with pytest.raises(TableError, match=match):
        find_columns(Table("t.csv", names, [], []), **given)


# --- kinds of tasks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "labels"),
    [
        (["yes", "no"], Kind.CLASSIFICATION, ("no", "yes")),
        (["10", "9", "2"], Kind.CLASSIFICATION, ("2", "9", "10")),
        ([1, 0, 1], Kind.CLASSIFICATION, ("0", "1")),
        ([1.0, 2.0], Kind.CLASSIFICATION, ("1", "2")),
        ([True, False], Kind.CLASSIFICATION, ("false", "true")),
        (["0.5", "1"], Kind.REGRESSION, ()),
        ([3.5, 2, 1], Kind.REGRESSION, ()),
        (list(range(100, 130)), Kind.REGRESSION, ()),
        (list(range(30)) * 5, Kind.CLASSIFICATION, tuple(map(str, range(30)))),
        ([["a", "b"], [], ["a"]], Kind.MULTI_LABEL, ("a", "b")),
        (["['a', 'b']", "['a']"], Kind.MULTI_LABEL, ("a", "b")),
    ],
)
def test_the_labels_say_what_kind_of_task_it_is(values: list[Any], kind: Kind, labels: tuple[str, ...]) -> None:
    found = problem_of(labelled(values))
    assert (found.kind, found.labels) == (kind, labels)


def test_words_with_tags_are_a_token_classification() -> None:
    rows = [{"text": ["Ada", "ran"], "label": ["B-PER", "O"]}]
    found = problem_of(table(rows))
    assert (found.kind, found.labels) == (Kind.TOKENS, ("O", "B-PER"))
    # In a CSV file the user has to say so: it is text in both columns.
    found = problem_of(table([{"text": "Ada ran", "label": "B-PER O"}]), Kind.TOKENS)
    assert found.labels == ("O", "B-PER")


def test_several_labels_in_one_cell_and_in_several_columns() -> None:
    made = labelled(["a;b", "b", "", "a"])
    found = problem_of(made, Kind.MULTI_LABEL)
    assert (found.labels, found.separator) == (("a", "b"), ";")
    assert to_examples(made, TWO, found).labels == [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    columns = Columns("text", None, ("rude", "threat"))
    made = table([{"text": "x", "rude": "1", "threat": "0"}, {"text": "y", "rude": "false", "threat": "true"}])
    found = problem_of(made, columns=columns)
    assert (found.kind, found.labels) == (Kind.MULTI_LABEL, ("rude", "threat"))
    assert to_examples(made, columns, found).labels == [[1.0, 0.0], [0.0, 1.0]]


def test_names_of_a_data_set_on_the_hub_win_and_keep_their_ids() -> None:
    made = table([{"text": "x", "label": i} for i in (1, 0, 1)], label_names={"label": ["pos", "neg"]})
    found = problem_of(made)
    assert found.labels == ("pos", "neg")
    assert to_examples(made, TWO, found).labels == [1, 0, 1]


BAD_LABELS: dict[str, tuple[list[Any], Kind | None, str]] = {
    "one class": (["yes"] * 5, None, r'only one value, "yes"'),
    "one number": ([0.5] * 5, Kind.REGRESSION, "only one value, 0.5"),
    "text among numbers": ([1, 2] * 10 + ["n/a"], None, r"line 22.*'n/a' there and 1 elsewhere"),
    "number among text": (["a", "b"] * 10 + ["7"], None, r"line 22.*'7' there and 'a' elsewhere"),
    "free text": ([f"note {i}" for i in range(40)], None, "40 different values in 40 rows"),
    "no number": (["1", "x"], Kind.REGRESSION, r"line 3: .*'x', not a number"),
    "a list": (["a", ["b"]], Kind.CLASSIFICATION, "line 3: .*holds a list"),
    "nothing to separate": (["a", "b"], Kind.MULTI_LABEL, "No cell of"),
    "no words": ([5], Kind.TOKENS, "line 2: .*not a list of words"),
}


@pytest.mark.parametrize("mistake", BAD_LABELS)
def test_bad_labels_are_one_sentence_with_their_row(mistake: str) -> None:
    values, kind, match = BAD_LABELS[mistake]
    with pytest.raises(TableError, match=match):
        problem_of(labelled(values), kind)


def test_asking_for_a_classification_takes_mixtures_and_many_names() -> None:
    assert problem_of(labelled([1, 2, "n/a"]), Kind.CLASSIFICATION).labels == ("1", "2", "n/a")
    assert len(problem_of(labelled([f"n{i}" for i in range(40)]), Kind.CLASSIFICATION).labels) == 40


def test_a_label_to_evaluate_on_that_was_not_trained_on() -> None:
    with pytest.raises(TableError, match=r'line 3: the label "c" is in no row of t\.csv'):
        find_problem([labelled(["a", "b"]), labelled(["a", "c"])], TWO)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"text": "  ", "label": "a"}, r'line 3: the text in "text" is empty'),
        ({"text": None, "label": "a"}, r'line 3: the text in "text" is empty'),
        ({"text": "x", "label": ""}, r'line 3: the label in "label" is missing'),
        ({"text": "x", "label": float("nan")}, r'line 3: the label in "label" is missing'),
        ({"text": "x", "label": "nan"}, r"line 3: the label"),
        ({"text": 3.5, "label": "a"}, r"line 3: \"text\" is 3.5, a float and no text"),
    ],
)
def test_rows_that_lack_something(row: dict[str, Any], match: str) -> None:
    made = table([{"text": "x", "label": "a"}, row, {"text": "y", "label": "b"}])
    with pytest.raises(TableError, match=match):
        complete_rows(made, TWO, kind=None, skip=False)
    if "no text" not in match:
        kept, skipped = complete_rows(made, TWO, kind=None, skip=True)
        assert ([row["text"] for row in kept.rows], skipped) == (["x", "y"], 1)
        assert kept.place(1) == "t.csv, line 4"


def test_words_and_labels_of_different_number() -> None:
    made = table([{"text": ["a", "b"], "label": ["O"]}])
    with pytest.raises(TableError, match=r"line 2: 2 words .* and 1 labels"):
        to_examples(made, TWO, Problem(Kind.TOKENS, ("O",)))


# --- the split -------------------------------------------------------------------------------------------------------


def split(labels: list[Any], problem: Problem, share: float = 0.2, seed: int = 1) -> tuple[list[int], list[int]]:
    return split_rows(
        Examples([("x",)] * len(labels), labels), problem, table=labelled(labels), share=share, seed=seed
    )


def test_the_split_has_the_same_share_of_each_label() -> None:
    labels = [0] * 70 + [1] * 20 + [2] * 10
    train, evaluation = split(labels, Problem(Kind.CLASSIFICATION, ("a", "b", "c")))
    assert Counter(labels[i] for i in evaluation) == {0: 14, 1: 4, 2: 2}
    assert sorted(train + evaluation) == list(range(100))
    assert split(labels, Problem(Kind.CLASSIFICATION, ("a", "b", "c"))) == (train, evaluation)
    assert split(labels, Problem(Kind.CLASSIFICATION, ("a", "b", "c")), seed=2)[1] != evaluation


def test_a_rare_label_is_on_both_sides() -> None:
    labels = [0] * 50 + [1] * 2
    train, evaluation = split(labels, Problem(Kind.CLASSIFICATION, ("a", "b")), share=0.1)
    assert {labels[i] for i in train} == {labels[i] for i in evaluation} == {0, 1}


def test_the_evaluation_does_not_grow_without_end() -> None:
    train, evaluation = split([0.5] * 30_000, Problem(Kind.REGRESSION))
    assert len(evaluation) == MOST_EVALUATION_ROWS
    assert not set(train) & set(evaluation)


def test_a_label_in_one_row_and_too_few_rows() -> None:
    with pytest.raises(TableError, match=r't\.csv, line 6: the label "b" is in this row only'):
        split([0, 0, 0, 0, 1], Problem(Kind.CLASSIFICATION, ("a", "b")))
    with pytest.raises(TableError, match=r'line 2: the label "b" is in this row only'):
        split([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], Problem(Kind.MULTI_LABEL, ("a", "b")))
    with pytest.raises(TableError, match="has 3 rows"):
        split([0, 0, 1], Problem(Kind.CLASSIFICATION, ("a", "b")))


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_encoding_cuts_and_counts() -> None:
    examples = Examples([("a b c d e",), ("a",)], [1, 0])
    made = encode(examples, Problem(Kind.CLASSIFICATION, ("x", "y")), tokenizer(), 4)
    assert made.cut == 1
    assert [len(row["input_ids"]) for row in made.rows] == [4, 3]
    assert [row["labels"] for row in made.rows] == [1, 0]


def test_words_have_their_label_at_their_first_token() -> None:
    examples = Examples([["a", "b-c", "d"], ["a"] * 9], [[0, 1, 2], [0] * 9])
    made = encode(examples, Problem(Kind.TOKENS, ("O", "X", "Y")), tokenizer(), 8)
    assert made.rows[0]["labels"] == [IGNORED, 0, 1, IGNORED, IGNORED, 2, IGNORED]
    assert made.lost_words == 3
    assert made.cut == 1


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_each_kind_by_hand() -> None:
    two = Problem(Kind.CLASSIFICATION, ("a", "b"))
    found = scores(two, Answers([0, 0, 0, 1], [0, 0, 1, 1]))
    assert found == pytest.approx(
        {"accuracy": 0.75, "f1_macro": (0.8 + 2 / 3) / 2, "matthews_correlation": 1 / 3**0.5}
    )
    several = Problem(Kind.MULTI_LABEL, ("a", "b"))
    found = scores(several, Answers([[1, 0], [1, 1]], [[1, 0], [0, 1]]))
    assert found == pytest.approx({"f1_micro": 0.8, "f1_macro": (2 / 3 + 1) / 2, "exact_match": 0.5})
    found = scores(Problem(Kind.REGRESSION), Answers([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]))
    assert found == pytest.approx({"rmse": 1.0, "mae": 1.0, "spearmanr": 1.0, "pearsonr": 1.0})
    words = Problem(Kind.TOKENS, ("DET", "NOUN"))
    right, given = np.array([[-100, 0, 1], [1, -100, -100]]), np.array([[1, 0, 1], [0, 0, 0]])
    assert scores(words, Answers(right, given, lost_words=1)) == {"accuracy": 0.5}
    assert [entry["count"] for entry in label_scores(words, Answers(right, given))] == [1, 2]


@pytest.mark.parametrize("kind", Kind)
def test_names_and_main_metric_are_among_the_scores(kind: Kind) -> None:
    problem = Problem(kind, () if kind is Kind.REGRESSION else ("O", "B-x"))
    shape = {Kind.MULTI_LABEL: (3, 2), Kind.TOKENS: (3, 4)}.get(kind, (3,))
    right = np.arange(np.prod(shape)).reshape(shape) % 2
    found = scores(problem, Answers(right, right))
    assert tuple(found) == metric_names(problem)
    assert main_metric(problem) in found


def test_the_constant_answer() -> None:
    two = Problem(Kind.CLASSIFICATION, ("a", "b"))
    assert constant_answer(two, [1, 1, 0]) == 1
    assert constant_scores(two, 1, [0, 1])["accuracy"] == 0.5
    assert constant_answer(Problem(Kind.REGRESSION), [1.0, 2.0]) == 1.5
    assert constant_scores(Problem(Kind.REGRESSION), 1.5, [1.0, 2.0]) == pytest.approx(
        {"rmse": 0.5, "mae": 0.5, "spearmanr": 0.0, "pearsonr": 0.0}
    )
    tags = Problem(Kind.TOKENS, ("O", "B-x"))
    assert constant_scores(tags, 0, [[0, 1], [0, -100]])["entity_f1"] == 0.0
    assert constant_answer(Problem(Kind.MULTI_LABEL, ("a", "b")), [[1.0, 0.0], [1.0, 0.0]]).tolist() == [1.0, 0.0]


def test_correlations_of_what_is_no_number_are_none() -> None:
    assert np.isnan(correlations([1.0, 2.0, 3.0], [1.0, float("nan"), 2.0])["pearsonr"])


def test_entities_as_conll_counts_them() -> None:
    assert entities(["B-A", "I-A", "O", "I-B", "I-B", "B-B", "I-A"]) == {
        ("A", 0, 2),
        ("B", 3, 5),
        ("B", 5, 6),
        ("A", 6, 7),
    }
    found = entity_scores([["B-A", "I-A", "O", "B-B"]], [["B-A", "O", "O", "B-B"]])
    assert found == {"entity_f1": 0.5, "entity_precision": 0.5, "entity_recall": 0.5}


def test_separators_are_found_in_the_header() -> None:
    assert delimited.read_delimited("a;b\n1,5;x\n", "t").rows == [{"a": "1,5", "b": "x"}]
