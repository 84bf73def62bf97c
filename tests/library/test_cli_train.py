"""`bitfit train` and `bitfit eval` on a tiny random base: every kind of task, and what a user sees and gets."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Result, Run
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizer, pipeline

from bitfit_hf import BiasDelta
from bitfit_hf.cli.train import run as running
from bitfit_hf.cli.train.data import Scale
from bitfit_hf.cli.train.settings import FEWEST_EPOCHS, MOST_EPOCHS, UPDATES, Settings, default_epochs

ROOT = Path(__file__).resolve().parents[2]
WORDS = "good bad fine poor film book song the a is very Ada Bob Rome".split()
GOOD, BAD = ("good", "fine"), ("bad", "poor")
FILES = {
    *("adapter_config.json", "adapter_model.safetensors", "README.md", "bias_change.png", "evaluation.json"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT whose heads can learn from single words."""
    folder = tmp_path_factory.mktemp("train") / "base"
    torch.manual_seed(0)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    config = BertConfig(
        vocab_size=len(specials) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
    )
    model = BertModel(config)
    torch.nn.init.normal_(model.pooler.dense.bias, std=0.1)  # as if it had been trained
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate([*specials, *map(str.lower, WORDS)])}).save_pretrained(
        folder
    )
    return folder


def sentence(number: int) -> tuple[str, bool]:
    good = number % 3 != 0
    words = GOOD if good else BAD
    return f"the {WORDS[4 + number % 4]} is very {words[number % 2]}", good


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def reviews(path: Path, count: int = 60) -> Path:
    rows = [{"review": text, "stars": "up" if good else "down"} for text, good in map(sentence, range(count))]
    return write_csv(path, rows)


FAST = ("--batch-size", 8, "--lr", 0.02)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of a classification, made in the test's process."""
    import typer

    from bitfit_hf.cli import app

    root = tmp_path_factory.mktemp("trained")
    table = reviews(root / "reviews.csv")
    args = ["train", table, "--base", base, "-o", root / "task", "--epochs", 8, "--license", "mit", *FAST, "-q"]
    with pytest.raises(SystemExit) as end:
        typer.main.get_command(app).main([str(arg) for arg in args], prog_name="bitfit")
    assert not end.value.code
    return root / "task"


# --- a classification, from end to end -------------------------------------------------------------------------------


def test_the_folder_holds_a_delta_its_card_its_picture_and_its_figures(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == FILES
    assert [path.name for path in trained.parent.iterdir() if path.name.startswith(".")] == []
    card = (trained / "README.md").read_text()
    assert "license: mit" in card
    assert "bias_change.png" in card
    delta = BiasDelta.from_pretrained(trained)
    assert any(value.abs().max() > 0 for value in delta.values())
    assert delta.config.id2label == {0: "down", 1: "up"}


def test_how_it_trains_is_recommended_unless_somebody_says_otherwise(
    run: Run, base: Path, trained: Path, tmp_path: Path
) -> None:
    def used(folder: Path) -> dict[str, Any]:
        values = json.loads((folder / "adapter_config.json").read_text())["run"]["hyperparameters"]
        return {name: values[name] for name in ("learning_rate", "lr_scale", "dropout")}

    scale = "b_q, b_k, b_v, b_m2, head × 3"
    assert used(trained) == {"learning_rate": 0.02, "lr_scale": scale, "dropout": "none"}
    table = reviews(tmp_path / "reviews.csv", 16)
    options = ("--epochs", 1, "--no-baseline", "-q")
    run("train", table, "--base", base, "-o", tmp_path / "narrow", *options)
    assert used(tmp_path / "narrow") == {"learning_rate": 2e-3, "lr_scale": scale, "dropout": "none"}
    run("train", table, "--base", base, "-o", tmp_path / "papers", *options, "--rates", "uniform", "--dropout")
    expected = {"learning_rate": 2e-3, "lr_scale": "uniform", "dropout": "the model's own"}
    assert used(tmp_path / "papers") == expected


def test_the_figures_are_those_of_the_saved_delta(run: Run, trained: Path, tmp_path: Path) -> None:
    told = json.loads((trained / "evaluation.json").read_text())
    assert told["rows"] == {"train": 48, "evaluation": 12, "skipped": 0}
    assert told["systems"]["constant"]["accuracy"] == pytest.approx(8 / 12)
    assert told["systems"]["bitfit"]["accuracy"] == 1.0, "the words say it"
    assert set(told["systems"]) == {"constant", "frozen", "bitfit"}
    # All rows, of which `eval` knows nothing but the table.
    table = reviews(tmp_path / "more.csv", 30)
    out = tmp_path / "out.csv"
    found = run("eval", trained, table, "--predictions", out, "--json").json
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    task = pipeline("text-classification", model=model, tokenizer=str(trained))
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [row["prediction"] for row in rows] == [task(row["review"])[0]["label"] for row in rows]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert found["systems"]["bitfit"]["accuracy"] == pytest.approx(right / 30)
    assert [entry["count"] for entry in found["labels"]] == [10, 20]
    assert run("eval", trained, table, "-q").out == f"f1_macro {found['systems']['bitfit']['f1_macro']:.4f}\n"


def test_eval_takes_ids_for_names_and_says_which_label_it_does_not_know(
    run: Run, trained: Path, tmp_path: Path
) -> None:
    rows = [{"review": text, "stars": int(good)} for text, good in map(sentence, range(12))]
    named = run("eval", trained, reviews(tmp_path / "n.csv", 12), "--json").json
    assert run("eval", trained, write_csv(tmp_path / "i.csv", rows), "--json").json["systems"] == named["systems"]
    rows[4]["stars"] = "sideways"
    result = run("eval", trained, write_csv(tmp_path / "b.csv", rows))
    result.assert_mistake("b.csv, line 6", '"sideways"', "is none of the task's: down, up")


def test_what_a_stranger_sees(run: Run, base: Path, tmp_path: Path) -> None:
    table = reviews(tmp_path / "reviews.csv")
    folder = tmp_path / "task"
    dry = run("train", table, "--base", base, "-o", folder, "--dry-run", *FAST)
    assert dry.code == 0
    assert dry.out == "Nothing has been trained or written.\n"
    for told in (
        'Table    reviews.csv: texts in "review", labels in "stars"',
        "Task     text classification, 2 labels: up 67 %, down 33 %",
        "48 rows to train on, 12 to evaluate on",
        "the same share of each label",
        f"Writes   {folder}",
    ):
        assert told in dry.err.replace("\n         ", " ")
    assert not folder.exists()

    result = run("train", table, "--base", base, "-o", folder, "--epochs", 2, *FAST)
    assert result.code == 0
    assert dry.err.splitlines()[0] == result.err.splitlines()[0]
    assert "BitFit: 12 updates planned\n  epoch 1 · F1 " in result.err
    assert "Frozen body: 12 updates planned\n" in result.err
    assert 'always "up"' in result.out
    assert f"bitfit serve {base} --task task={folder}" in result.out
    assert "--base-model" in result.out, "the base is a folder, a push has to name one on the Hub"
    assert "\x1b[" not in result.out + result.err
    assert all(len(line) < 100 for line in result.err.splitlines() if str(tmp_path) not in line)

    again = run("train", table, "--base", base, "-o", folder, "--epochs", 1, *FAST)
    again.assert_mistake("is not empty", "--force")
    forced = run("train", table, "--base", base, "-o", folder, "--epochs", 1, "--no-baseline", "--force", "-q", *FAST)
    assert (forced.code, forced.out, forced.err) == (0, f"{folder}\n", "")
    assert "frozen" not in json.loads((folder / "evaluation.json").read_text())["systems"]


def test_the_lines_at_the_end_run(run: Run, trained: Path, tmp_path: Path) -> None:
    values = run(
        "train", reviews(tmp_path / "r.csv"), "--base", trained.parent / "no", "-o", tmp_path / "x", "--dry-run"
    )
    values.assert_mistake("There is no folder")
    program = "\n".join(
        [
            "import bitfit_hf",
            "from transformers import pipeline",
            f'task = pipeline("text-classification", model={str(trained)!r})',
            'print(task("the film is very good")[0]["label"], task("the film is very bad")[0]["label"])',
        ]
    )
    found: dict[str, Any] = {}
    exec(program.replace("print(", "found = ("), found)
    assert found["found"] == ("up", "down")


# --- the other kinds -------------------------------------------------------------------------------------------------


def test_a_regression_answers_in_the_unit_of_its_labels(run: Run, base: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "score": 250_000.0 if good else 40_000.5} for text, good in map(sentence, range(48))]
    table = write_csv(tmp_path / "t.csv", rows)
    folder = tmp_path / "task"
    values = run("train", table, "--base", base, "-o", folder, "--epochs", 10, "--json", *FAST).json
    assert values["task"] == "regression"
    systems = values["systems"]
    assert systems["constant"]["rmse"] == pytest.approx(99_000, rel=0.15)
    assert systems["bitfit"]["rmse"] < 30_000
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(folder)([row["text"] for row in rows], return_tensors="pt")
    with torch.no_grad():
        given = model(**encoded).logits[:, 0].numpy()
    error = float(np.sqrt(np.mean((given - np.array([row["score"] for row in rows])) ** 2)))
    assert error < 30_000
    found = run("eval", folder, table, "--json").json["systems"]["bitfit"]
    assert found["rmse"] == pytest.approx(error, rel=1e-4)


def test_several_labels(run: Run, base: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(40):
        text, good = sentence(number)
        tags = ["up"] * good + ["film"] * ("film" in text or "song" in text)
        rows.append({"text": text, "tags": ";".join(tags)})
    table = write_csv(tmp_path / "t.csv", rows)
    folder = tmp_path / "task"
    options = ("--task", "multi-label", "--epochs", 8, "--no-baseline", "--json")
    values = run("train", table, "--base", base, "-o", folder, *options, *FAST).json
    assert (values["task"], [entry["label"] for entry in values["labels"]]) == ("multi-label", ["film", "up"])
    assert values["systems"]["bitfit"]["f1_micro"] > values["systems"]["constant"]["f1_micro"]
    found = run("eval", folder, table, "--predictions", tmp_path / "p.csv", "--json").json
    assert found["systems"]["bitfit"]["f1_micro"] > 0.8
    predictions = [row["prediction"] for row in csv.DictReader((tmp_path / "p.csv").open())]
    assert {part for cell in predictions for part in cell.split(";") if part} <= {"film", "up"}


def test_words_and_pairs(run: Run, base: Path, tmp_path: Path) -> None:
    names = {"ada": "B-PER", "bob": "B-PER", "rome": "B-LOC"}
    rows = []
    for number in range(40):
        words = ["the", WORDS[11 + number % 3].lower(), "is", "very", WORDS[number % 4]]
        rows.append({"tokens": words, "ner_tags": [names.get(word, "O") for word in words]})
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "task"
    values = run("train", table, "--base", base, "-o", folder, "--epochs", 15, "--no-baseline", "--json", *FAST).json
    assert (values["task"], values["metric"]) == ("token-classification", "entity_f1")
    assert [entry["label"] for entry in values["labels"]] == ["O", "B-LOC", "B-PER"]
    assert values["systems"]["constant"]["entity_f1"] == 0
    assert values["systems"]["bitfit"]["entity_f1"] > 0.9
    assert run("eval", folder, table, "--json").json["systems"]["bitfit"]["entity_f1"] > 0.9

    pairs = [{"sentence1": sentence(n)[0], "sentence2": "the song", "label": n % 2} for n in range(16)]
    plan = run("train", write_csv(tmp_path / "p.csv", pairs), "--base", base, "-o", "x", "--dry-run", "--json").json
    assert plan["columns"] == {"text": "sentence1", "text2": "sentence2", "labels": ["label"]}


# --- mistakes, in the table and elsewhere ----------------------------------------------------------------------------

MISTAKES = {
    "missing column": ("text,label\na,1\n", ("--text", "txt"), ('no column "txt"',)),
    "empty text": ("text,label\na,x\n,y\nb,x\nc,y\n", (), ("t.csv, line 3", "is empty", "--skip-incomplete")),
    "one class": ("text,label\na,x\nb,x\nc,x\nd,x\n", (), ('only one value, "x"',)),
    "mixed types": ("text,label\n" + "a,1\nb,2\n" * 10 + "c,bad\n", (), ("line 22", "text and numbers mixed")),
    "label seen once": ("text,label\na,x\nb,x\nc,x\nd,y\n", (), ("line 5", '"y" is in this row only')),
    "encoding": ("text,label\ncaf\xe9,x\n".encode("latin-1"), (), ("line 2", "0xe9", "--encoding")),
    "empty": ("", (), ("t.csv is empty",)),
    "ragged": ("text,label\na,b,c\n", (), ("line 2", "3 values")),
    "header twice": ("text,text,label\na,b,c\n", (), ('names "text" more than once',)),
    "no label": ("text,label\na,x\nb,nan\nc,y\n", (), ("line 3", "missing")),
    "many classes": ("text,label\n" + "".join(f"a,l{i}\n" for i in range(50)), (), ("50 different values",)),
    "no file": (None, (), ("There is no file",)),
    "no term": ("text,label\n" + "a,x\nb,y\n" * 4, ("--terms", "b_z"), ("b_z",)),
    "rate": ("text,label\n" + "a,x\nb,y\n" * 4, ("--lr", "-1"), ("--learning-rate", "above 0")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(run: Run, base: Path, tmp_path: Path, mistake: str) -> None:
    content, options, told = MISTAKES[mistake]
    path = tmp_path / "t.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    run("train", path, "--base", base, "-o", tmp_path / "task", *options).assert_mistake(*told)
    assert not (tmp_path / "task").exists()


def test_a_base_that_cannot_have_the_head(run: Run, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    table = reviews(tmp_path / "r.csv")
    run("train", table, "--base", tmp_path / "vit", "-o", tmp_path / "t").assert_mistake("vit")


def test_eval_of_what_is_no_classifier(run: Run, trained: Path, tmp_path: Path) -> None:
    run("eval", trained, tmp_path / "no.csv").assert_mistake("There is no file")
    run("eval", tmp_path, tmp_path / "no.csv").assert_mistake("adapter_config.json")


# --- the setting, and ends before the end ----------------------------------------------------------------------------


def test_small_tables_get_more_epochs_and_large_ones_fewer() -> None:
    assert default_epochs(16, 16) == MOST_EPOCHS
    assert default_epochs(1_000_000, 16) == FEWEST_EPOCHS
    assert Settings().planned_updates(800) == pytest.approx(UPDATES, rel=0.01)


def test_a_classification_has_no_scale() -> None:
    from bitfit_hf.tables.examples import Examples
    from bitfit_hf.tables.problem import Kind, Problem

    assert Scale.of(Problem(Kind.CLASSIFICATION, ("a", "b")), Examples([("x",)], [1])) == Scale()
    scale = Scale.of(Problem(Kind.REGRESSION), Examples([("x",), ("y",)], [2.0, 6.0]))
    assert scale == Scale(4.0, 2.0)
    assert scale.inward(Examples([("x",)], [6.0])).labels == [1.0]


def test_ctrl_c_ends_early_and_keeps_the_best_evaluation(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    step = running.ShowProgress.on_step_end

    def press(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, args, state, control, **kwargs)

    monkeypatch.setattr(running.ShowProgress, "on_step_end", press)
    table = reviews(tmp_path / "r.csv")
    values = run("train", table, "--base", base, "-o", tmp_path / "t", "--epochs", 10, "--json", *FAST).json
    assert values["training"]["updates"] in (9, 10)
    assert "frozen" not in values["systems"]
    assert {path.name for path in (tmp_path / "t").iterdir()} == FILES
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_is_left_behind_by_a_run_that_fails(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise OSError("the disk is full")

    monkeypatch.setattr(running.Run, "frozen", broken)
    table = reviews(tmp_path / "r.csv")
    options = ("train", table, "--base", base, "-o", tmp_path / "t", "--epochs", 1, *FAST)
    result = run(*options)
    assert (result.code, result.out) == (1, "")
    assert "the disk is full" in result.err
    # The comparison comes after the delta, which is kept.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "t"]
    assert {path.name for path in (tmp_path / "t").iterdir()} == FILES

    shutil.rmtree(tmp_path / "t")
    monkeypatch.setattr(running.Trainer, "evaluate", broken)
    result = run(*options)
    assert result.code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.csv"]


@pytest.mark.slow
def test_two_processes(base: Path, tmp_path: Path) -> None:
    table = reviews(tmp_path / "r.csv")
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "recipes" / "accelerate" / "cpu_2_processes.yaml")),
        *("-m", "bitfit_hf.cli", "train", str(table), "--base", str(base), "-o", str(tmp_path / "t")),
        *("--epochs", "8", "--patience", "0", "--json", *map(str, FAST)),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    result = Result(done.returncode, done.stdout, done.stderr)
    values = result.json
    assert values["training"]["updates"] == 8 * 6, "batches of 8 over both processes, of 48 rows"
    assert values["systems"]["bitfit"]["accuracy"] == 1.0
    assert {path.name for path in (tmp_path / "t").iterdir()} == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "t"]
    assert done.stderr.count("Table    r.csv") == 1
