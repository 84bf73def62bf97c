"""The GLUE recipe on a tiny model and made-up rows."""

from __future__ import annotations

from pathlib import Path

import glue
import numpy as np
import pytest
import squad
import torch
from common.data import GLUE
from common.record import RunRecord
from datasets import Dataset
from launching import launch_two
from recipe_fixtures import ROWS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bitfit_hf import BiasDelta

ROOT = Path(glue.__file__).resolve().parents[1]
TINY = ["--epochs", "2", "--batch_size", "8", "--learning_rate", "1e-2"]


def run(study_base: str, study_data: Path, folder: Path, task: str, *options: str) -> RunRecord:
    places = ["--model_name_or_path", study_base, "--data_dir", str(study_data), "--output_dir", str(folder)]
    return glue.main(["--task", task, *places, *TINY, *options])


def lines(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


# One sentence, two, scores instead of classes, two validation sets; the slow tests are the others.
SOME_TASKS = ("cola", "rte", "stsb", "mnli")


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=() if task in SOME_TASKS else pytest.mark.slow) for task in GLUE]
)
def test_every_task_is_trained_evaluated_and_predicted(task, study_base, study_data, tmp_path, capsys):
    record = run(study_base, study_data, tmp_path, task, "--train_metrics", "5")

    assert RunRecord.read(tmp_path / "run.json") == record
    assert (record.recipe, record.task, record.model, record.method) == ("glue", task, "tiny-bert", "bitfit")
    spec = GLUE[task]
    assert record.metric == spec.metric
    assert [entry["epoch"] for entry in record.history] == [1.0, 2.0]
    assert all(entry["train_loss"] > 0 for entry in record.history)
    assert all(spec.metric in entry["eval"] and spec.metric in entry["train"] for entry in record.history)
    assert record.metrics["final"] == record.history[-1]["eval"]
    assert record.metrics["best"][spec.metric] == max(entry["eval"][spec.metric] for entry in record.history)
    assert ("mismatched_accuracy" in record.metrics["best"]) == (task == "mnli")
    labels = max(len(spec.labels), 1)
    # two layers, each of 7 terms as wide as the model and the intermediate one; the embeddings' norm and the pooler
    assert record.trainable["body"] == 2 * (7 * 16 + 32) + 2 * 16
    assert record.trainable["head"] == 17 * labels
    assert record.data["rows"]["train"] == ROWS["train"]
    assert (record.hardware["processes"], record.hardware["engine"]) == (1, "one process")
    assert "/" not in record.config["data_dir"]
    assert str(study_data) not in (tmp_path / "run.json").read_text()
    assert f"{task}, bitfit, learning rate 0.01, seed 0" in capsys.readouterr().out

    delta = BiasDelta.from_pretrained(tmp_path)
    assert delta.num_parameters(head=True) == record.trainable["body"] + record.trainable["head"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert tuple(loaded.config.id2label.values())[: len(spec.labels)] == spec.labels

    assert record.notes["predictions"] == [f"predictions/{file}" for file in spec.files.values()]
    allowed = set(spec.labels) if task in ("rte", "qnli", "mnli") else {"0", "1"}
    for file in record.notes["predictions"]:
        header, *rows = lines(tmp_path / file)
        assert header == ["index", "prediction"]
        assert [index for index, _ in rows] == [str(number) for number in range(ROWS["test"])]
        if task == "stsb":
            assert all(0 <= float(value) <= 5 for _, value in rows)
        else:
            assert {value for _, value in rows} <= allowed


@pytest.mark.parametrize(
    ("task", "values", "shown"),
    [
        ("rte", [0, 1, 0], ["entailment", "not_entailment", "entailment"]),
        ("qnli", [1, 1, 0], ["not_entailment", "not_entailment", "entailment"]),
        ("mnli", [2, 1, 0], ["contradiction", "neutral", "entailment"]),
        ("cola", [1, 0, 1], ["1", "0", "1"]),
        ("sst2", [1, 0, 1], ["1", "0", "1"]),
        ("mrpc", [1, 0, 1], ["1", "0", "1"]),
        ("qqp", [1, 0, 1], ["1", "0", "1"]),
        ("stsb", [-0.5, 6.0, 2.34567], ["0.000", "5.000", "2.346"]),
    ],
)
def test_prediction_files_have_the_servers_form(task, values, shown, tmp_path):
    rows = Dataset.from_dict({"idx": [2, 0, 1]})  # files are in the order of the index, whatever the rows' order is
    glue.write_predictions(tmp_path / "made" / "x.tsv", task, rows, np.array(values))
    text = (tmp_path / "made" / "x.tsv").read_text()
    assert text == f"index\tprediction\n0\t{shown[1]}\n1\t{shown[2]}\n2\t{shown[0]}\n"


def test_predictions_are_the_models_own(study_base, study_data, tmp_path):
    """Each line is what the saved model says to the row of that index."""
    run(study_base, study_data, tmp_path, "mnli", "--predict_validation", "--diagnostics", "--learning_rate", "0.3")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    record = RunRecord.read(tmp_path / "run.json")
    assert record.notes["predictions"] == [
        "predictions/MNLI-m.tsv",
        "predictions/MNLI-mm.tsv",
        "predictions_validation/MNLI-m.tsv",
        "predictions_validation/MNLI-mm.tsv",
        "predictions/AX.tsv",
    ]
    _, *rows = lines(tmp_path / "predictions_validation" / "MNLI-m.tsv")
    assert len(rows) == ROWS["validation"]
    validation = glue.load_glue("mnli", str(study_data))["validation_matched"]
    right = 0
    for row, (index, shown) in zip(validation, rows, strict=True):
        batch = tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")
        with torch.no_grad():
            answer = model.config.id2label[int(model(**batch).logits.argmax())]
        assert (index, shown) == (str(row["idx"]), answer)
        right += GLUE["mnli"].labels[row["label"]] == shown
    assert right / len(rows) == pytest.approx(record.metrics["final"]["accuracy"])
    assert len(lines(tmp_path / "predictions" / "AX.tsv")) == 1 + 9


def test_what_is_reported_is_not_chosen_on(study_base, study_data, tmp_path):
    record = run(study_base, study_data, tmp_path, "rte", "--dev_halves", "True", "--epochs", "2")
    rows = record.data["rows"]
    assert abs(rows["validation"] - rows["report"]) <= 1
    for entry in record.history:
        assert {"accuracy", "report_accuracy", "loss", "report_loss"} == entry["eval"].keys()
        assert isinstance(entry["constant"], bool)
    best = max(record.history, key=lambda entry: entry["eval"]["accuracy"])
    assert record.metrics["best"] == best["eval"]
    times = [entry["processor_seconds"] for entry in record.history]
    assert 0 < times[0] < times[1] <= record.processor_seconds
    with pytest.raises(SystemExit, match="--dev_halves is for GLUE and for tagging"):
        squad.main(["--dev_halves", "True"])


def test_the_record_says_the_precision_that_a_launcher_asked_for(study_base, study_data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    record = run(study_base, study_data, tmp_path, "rte", "--max_steps", "1")
    assert (record.config["precision"], record.hardware["precision"]) == ("fp32", "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert run(study_base, study_data, tmp_path, "rte", "--max_steps", "1").hardware["precision"] == "fp32"


def test_without_a_test_split_there_are_predictions_only_when_asked_for(study_base, study_data, tmp_path):
    few = tmp_path / "data" / "rte"
    few.mkdir(parents=True)
    for split in ("train", "validation"):
        (few / f"{split}.jsonl.gz").write_bytes((study_data / "glue" / "rte" / f"{split}.jsonl.gz").read_bytes())
    record = run(study_base, tmp_path / "data", tmp_path / "without", "rte")
    assert record.notes["predictions"] == []
    assert not list((tmp_path / "without").glob("predictions*"))
    record = run(study_base, tmp_path / "data", tmp_path / "with", "rte", "--predict_validation")
    assert record.notes["predictions"] == ["predictions_validation/RTE.tsv"]
    assert len(lines(tmp_path / "with" / "predictions_validation" / "RTE.tsv")) == 1 + ROWS["validation"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "wnli"], r"choose from rte, .* \(WNLI is left out"),
        (["--task", "rte", "--diagnostics"], "--diagnostics goes with --task mnli"),
    ],
)
def test_a_wrong_task_is_an_error_before_any_work(options, message):
    with pytest.raises(SystemExit, match=message):
        glue.main(options)


def test_a_small_run_is_small_and_the_seed_decides_it(study_base, study_data, tmp_path):
    options = ["--train_size", "9", "--eval_size", "6", "--max_steps", "3", "--batch_size", "4"]
    first, again, other = (
        run(study_base, study_data, tmp_path / str(number), "rte", *options, "--seed", str(seed))
        for number, seed in enumerate([0, 0, 1])
    )
    assert first.data["rows"] == {"train": 9, "validation": 6}
    assert first.history[-1]["step"] == 3
    clock = dict.fromkeys(("seconds", "processor_seconds"))
    learned = [[entry | clock for entry in record.history] for record in (first, again, other)]
    assert learned[0] == learned[1]
    assert learned[0] != learned[2]


@pytest.mark.parametrize("method", ["full", "frozen", "bitfit:query+intermediate"])
def test_other_methods(method, study_base, study_data, tmp_path):
    record = run(study_base, study_data, tmp_path, "rte", "--method", method, "--precision", "bf16")
    body = {"full": record.trainable["base"], "frozen": 0, "bitfit:query+intermediate": 2 * (16 + 32)}[method]
    assert (record.method, record.trainable["body"], record.trainable["head"]) == (method, body, 34)
    assert record.hardware["precision"] == "bf16"
    assert 0 < record.bytes <= sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file())


@pytest.mark.slow
def test_two_processes_score_every_row_once_and_leave_one_record(study_base, study_data, tmp_path):
    """Evaluated before a step is taken (rate 0), so that one process and two must agree."""
    options = ["--max_steps", "1", "--learning_rate", "0", "--predict_validation", "--train_metrics", "7"]
    one = run(study_base, study_data, tmp_path / "one", "mnli", *options)
    places = ["--data_dir", study_data, "--output_dir", tmp_path / "two", "--model_name_or_path", study_base]
    done = launch_two("glue", "--task", "mnli", *places, *TINY, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    two = RunRecord.read(tmp_path / "two" / "run.json")
    assert two.hardware["processes"] == 2
    assert done.stdout.count("mnli, bitfit, learning rate") == 1
    for kind in ("eval", "train"):
        assert two.history[-1][kind].keys() == one.history[-1][kind].keys()
        for name, value in one.history[-1][kind].items():
            # The loss is a mean over batches, and those differ.
            assert two.history[-1][kind][name] == pytest.approx(value, abs=5e-3 if name.endswith("loss") else 1e-9)
    for file in one.notes["predictions"]:
        assert (tmp_path / "two" / file).read_text() == (tmp_path / "one" / file).read_text()
    assert two.bytes == pytest.approx(one.bytes, abs=100)  # what the delta says of its run has as many digits or not
    assert two.hardware["engine"] == "DDP"
