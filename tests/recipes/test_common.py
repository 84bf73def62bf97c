"""What the study recipes share: arguments, data, metrics and records."""

from __future__ import annotations

import json
import math
import subprocess
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import quickstart
import torch
from common import record as record_module
from common.arguments import StudyArguments, parse
from common.data import GLUE, GLUE_COLUMNS, by_length, evaluation_parts, halves, load_glue, load_splits, subset
from common.hardware import computes_in_bf16
from common.metrics import constant, glue_metrics, word_accuracy
from common.models import locate, new_model, public_name
from common.record import RunRecord, checkout, without_paths
from common.training import Evaluation, Split, Stopwatch, TaskData, chosen_method, summary, training_arguments
from datasets import Dataset
from recipe_fixtures import ROWS
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, EvalPrediction, TrainerControl, TrainerState

# --- arguments -------------------------------------------------------------------------------------------------------
from bitfit_hf.tables import hub_data


@dataclass
class Arguments(StudyArguments):
    names: list[str] = field(default_factory=lambda: ["one"])
    flag: bool = True


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_file_gives_defaults_and_the_command_line_wins(tmp_path):
    path = config(
        tmp_path,
        "learning_rate: 4e-3\nepochs: 5\nnames: [a, b]\nflag: false\nprecision: bf16\nmax_steps: null\nwarmup: -1e-2\n"
        "method_options: {rank: 16, alpha: 1.0e-5, terms: query, deep: true}\n",
    )
    args = parse(Arguments, ["--epochs", "7", "--config", path, "--train_size", "10"])
    assert (args.learning_rate, args.epochs, args.train_size, args.max_steps) == (4e-3, 7.0, 10, None)
    assert (args.names, args.flag, args.precision, args.warmup) == (["a", "b"], False, "bf16", -0.01)
    assert args.options_of_method() == {"rank": 16, "alpha": 1e-5, "terms": "query", "deep": True}
    assert parse(Arguments, ["--config", path, "--names", "c", "--flag", "true"]).names == ["c"]
    assert parse(Arguments, []) == Arguments()
    assert parse(Arguments, ["--config", config(tmp_path, "# nothing\n")]) == Arguments()


def test_several_dataclasses(tmp_path):
    @dataclass
    class More:
        depth: int = 3

    first, second = parse((Arguments, More), ["--config", config(tmp_path, "depth: 4\nseed: 9\n")])
    assert (first.seed, second.depth) == (9, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-3\nseeed: 1\n", "unknown option learning_rat, seeed; there are model_name_or_path, "),
        ("- a\n- b\n", "must hold a mapping of option names to values, holds a list"),
        ("epochs: many\n", "--epochs: invalid float value: 'many'"),
        ("train_size: 1.5\n", "invalid int value: '1.5'"),
        ("precision: int8\n", "invalid choice"),
        ("seed: null\n", "seed must have a value"),
        ("seed: {a: 1}\n", "seed must be a value, is a mapping"),
        ("seed: [1, 2]\n", "unrecognized arguments: 2"),
        ("a: b: c\n", "not a YAML file"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path, capsys, text, message):
    path = config(tmp_path, text)
    with pytest.raises(SystemExit) as error:
        parse(Arguments, ["--config", path])
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert f"{path}: " in shown
    assert message in shown


def test_what_is_wrong_on_the_command_line_is_said_without_the_file(tmp_path, capsys):
    path = config(tmp_path, "seed: 1\n")
    with pytest.raises(SystemExit):
        parse(Arguments, ["--config", path, "--epoch", "3"])  # no abbreviations: they would change meaning
    shown = capsys.readouterr().err
    assert "unrecognized arguments: --epoch 3" in shown
    assert path not in shown
    with pytest.raises(SystemExit):
        parse(Arguments, ["--config", str(tmp_path / "gone.yaml")])
    assert "gone.yaml: cannot be read (No such file" in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["rank", "=3", "a b=3"])
def test_options_of_a_method_need_names(entry):
    with pytest.raises(ValueError, match="not of the form name=value"):
        Arguments(method_options=[entry]).options_of_method()


# --- data ------------------------------------------------------------------------------------------------------------


def test_the_table_of_glue_tasks():
    assert len(GLUE) == 8
    assert "wnli" not in GLUE
    assert [name for name, *_ in GLUE_COLUMNS] == "QNLI SST-2 MNLI-m MNLI-mm CoLA MRPC STS-B RTE QQP".split()
    assert {(task, suffix) for _, task, suffix in GLUE_COLUMNS} == {
        (task, suffix) for task, spec in GLUE.items() for suffix in spec.files
    }
    files = [name for spec in GLUE.values() for name in spec.files.values()]
    assert sorted(files) == sorted(f"{column}.tsv" for column, *_ in GLUE_COLUMNS)
    assert GLUE["mnli"].splits("test") == ("test_matched", "test_mismatched")
    assert quickstart.GLUE is GLUE


@pytest.mark.parametrize("inside", ["", "glue", "glue/rte"])
def test_local_files_are_found_in_the_folder_or_below(study_data, inside):
    splits = load_glue("rte", str(study_data / inside))
    if inside == "":
        assert {name: len(rows) for name, rows in splits.items()} == ROWS
    assert splits["train"].column_names == ["sentence1", "sentence2", "label", "idx"]


def test_dev_is_validation(study_data):
    splits = load_splits("any", data_dir=str(study_data / "ud_ewt"))
    assert {name: len(rows) for name, rows in splits.items()} == ROWS


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no train\.jsonl\.gz or train\.jsonl in .*glue/rte or .*rte or "):
        load_glue("rte", str(tmp_path))


@pytest.mark.parametrize("revision", [None, "refs/convert/parquet"])
def test_a_data_set_that_is_a_script_is_read_from_the_hubs_conversion(monkeypatch, revision):
    asked = []

    def load_dataset(name, config=None, **options):
        asked.append((name, config, options))
        if options["revision"] is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        return {"train": name}

    monkeypatch.setattr(hub_data, "load_dataset", load_dataset)
    assert load_splits("a/b", "en_ewt", revision=revision) == {"train": "a/b"}
    assert asked[-1] == ("a/b", None, {"data_dir": "en_ewt", "revision": "refs/convert/parquet", "token": None})
    assert len(asked) == (2 if revision is None else 1)


def test_another_error_of_the_hub_is_shown(monkeypatch):
    def load_dataset(name, config=None, **options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(hub_data, "load_dataset", load_dataset)
    with pytest.raises(RuntimeError, match="out of order"):
        load_splits("a/b")


def test_subsets_are_nested_and_drawn_by_seed():
    rows = Dataset.from_dict({"n": list(range(50))})
    small, large = subset(rows, 5, seed=1)["n"], subset(rows, 20, seed=1)["n"]
    assert list(large)[:5] == list(small)
    assert list(subset(rows, 5, seed=2)["n"]) != list(small)
    assert list(subset(rows, None)["n"]) == list(subset(rows, 50)["n"]) == list(range(50))


def test_rows_by_length_are_the_same_rows():
    rows = Dataset.from_dict({"input_ids": [[1], [1, 2, 3], [1, 2]], "labels": [0, 1, 2]})
    assert by_length(rows)["labels"][:] == [1, 2, 0]


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_demo_model_is_read_from_its_package():
    assert locate(quickstart.DEMO_NAME) == quickstart.demo_model()
    assert locate("bert-base-cased") == "bert-base-cased"
    assert public_name("google/electra-base") == "google/electra-base"


def test_a_local_model_is_named_without_its_path(study_base):
    assert public_name(study_base) == "tiny-bert"


def test_the_same_seed_gives_the_same_head(study_base):
    first, again, other = (
        new_model(AutoModelForSequenceClassification, study_base, seed, num_labels=3).classifier.weight
        for seed in (1, 1, 2)
    )
    assert first.shape == (3, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- metrics ---------------------------------------------------------------------------------------------------------


def logits(classes: list[int]) -> np.ndarray:
    return np.eye(2, dtype=np.float32)[classes] * 3 - 1


LABELS = np.array([0, 1, 1, 0, 1, 1, 0, 1])
GUESSES = [0, 1, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("rte", {"accuracy": 0.75}),
        ("sst2", {"accuracy": 0.75}),
        ("qnli", {"accuracy": 0.75}),
        ("mnli", {"accuracy": 0.75}),
        ("cola", {"matthews_correlation": 7 / 15}),  # (2·4 − 1·1) / sqrt(5·5·3·3)
        ("mrpc", {"accuracy": 0.75, "f1": 0.8}),
        ("qqp", {"accuracy": 0.75, "f1": 0.8}),
    ],
)
def test_classification_metrics(task, expected):
    found = glue_metrics(task)(EvalPrediction(logits(GUESSES), LABELS))
    assert found == pytest.approx(expected)
    assert GLUE[task].metric in found
    reference = {
        "accuracy": accuracy_score(LABELS, GUESSES),
        "f1": f1_score(LABELS, GUESSES),
        "matthews_correlation": matthews_corrcoef(LABELS, GUESSES),
    }
    assert found == {name: reference[name] for name in found}


def test_every_task_has_a_metric():
    assert len({glue_metrics(task) for task in GLUE}) == len(GLUE)


def test_correlations_equal_scipys():
    scores, labels = np.array([[0.1], [2.0], [2.5], [4.9], [3.0]]), np.array([0.0, 1.5, 3.0, 5.0, 2.0])
    found = glue_metrics("stsb")(EvalPrediction(scores, labels))
    assert found == {
        "spearmanr": spearmanr(scores[:, 0], labels).statistic,
        "pearsonr": pearsonr(scores[:, 0], labels).statistic,
    }
    assert found["spearmanr"] == pytest.approx(0.9)


@pytest.mark.filterwarnings("error")
def test_a_constant_answer_correlates_with_nothing():
    constant = EvalPrediction(np.ones((4, 1)), np.array([0.0, 1.0, 2.0, 3.0]))
    assert glue_metrics("stsb")(constant) == {"spearmanr": 0.0, "pearsonr": 0.0}
    assert glue_metrics("cola")(EvalPrediction(logits([1, 1, 1]), np.array([0, 1, 1]))) == {"matthews_correlation": 0}


def test_answers_that_are_no_numbers_are_not_scored_as_zero():
    diverged = EvalPrediction(np.full((4, 1), np.nan), np.array([0.0, 1.0, 2.0, 3.0]))
    assert all(math.isnan(value) for value in glue_metrics("stsb")(diverged).values())


def test_accuracy_over_words():
    labels = np.array([[-100, 1, 2, -100, 0, -100], [-100, 2, -100, -100, -100, -100]])
    tags = np.array([[0, 1, 2, 2, 1, 0], [2, 2, 1, 1, -100, -100]])
    assert word_accuracy()(EvalPrediction(tags, labels)) == {"accuracy": 3 / 4}
    assert word_accuracy(lost=2)(EvalPrediction(tags, labels)) == {"accuracy": 3 / 6}
    assert word_accuracy()(EvalPrediction(np.eye(3)[tags.clip(0)], labels)) == {"accuracy": 3 / 4}


def test_a_constant_answer_is_noticed():
    classes, same = logits([0, 1, 1, 0]), logits([1, 1, 1, 1])
    assert constant(EvalPrediction(classes, LABELS[:4])) is False
    assert constant(EvalPrediction(same, LABELS[:4])) is True
    values = np.array([[2.0], [2.0005], [2.001]])
    assert constant(EvalPrediction(values, np.array([1.0, 2.0, 3.0]))) is True
    assert constant(EvalPrediction(values + np.array([[0.0], [0.1], [0.0]]), np.array([1.0, 2.0, 3.0]))) is False
    tags, labels = np.array([[1, 2], [1, 1]]), np.array([[0, -100], [1, 1]])
    assert constant(EvalPrediction(tags, labels)) is True  # the one that differs stands where there is no word
    assert constant(EvalPrediction(np.eye(3)[tags], np.array([[0, 1], [1, 1]]))) is False
    assert constant(EvalPrediction(np.ones((2, 3)), labels)) is None
    assert constant(EvalPrediction((classes, classes), (LABELS, LABELS))) is None  # an answer's start and end


# --- halves of a dev set ---------------------------------------------------------------------------------------------


def test_halves_are_the_same_each_time_and_share_no_row():
    rows = Dataset.from_dict({"n": list(range(101))})
    (chosen, reported), again = halves(rows), halves(rows)
    assert [list(half["n"]) for half in (chosen, reported)] == [list(half["n"]) for half in again]
    assert (len(chosen), len(reported)) == (51, 50)
    assert sorted([*chosen["n"], *reported["n"]]) == list(range(101))
    assert list(chosen["n"]) != sorted(chosen["n"])  # a file's rows may be sorted by label


def test_the_reported_half_is_named_so():
    splits = {"matched": Dataset.from_dict({"n": [1, 2, 3]}), "mismatched": Dataset.from_dict({"n": [4, 5]})}
    assert evaluation_parts(splits, False) is splits
    parts = evaluation_parts(splits, True)
    assert {name: len(rows) for name, rows in parts.items()} == {
        "matched": 2,
        "report": 1,
        "mismatched": 1,
        "report_mismatched": 1,
    }


# --- hardware --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),  # no word of it begins alike
        ("model name\t: bf16", False),
    ],
)
def test_bf16_is_for_processors_that_compute_in_it(line, expected, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert computes_in_bf16(True, tmp_path / "cpuinfo") is expected
    assert computes_in_bf16(True, tmp_path / "none") is False


def test_a_stopwatch_adds_up_what_it_ran():
    clock = Stopwatch()
    clock.stop()
    assert clock.read() == (0.0, 0.0)
    clock.go()
    time.sleep(0.02)
    clock.stop()
    first = clock.read()
    assert first.wall >= 0.02 > first.processor  # asleep, and no processor
    time.sleep(0.02)
    assert clock.read() == first
    clock.go()
    assert clock.read().wall > first.wall


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def record() -> RunRecord:
    return RunRecord(
        recipe="glue",
        task="rte",
        model="tiny-bert",
        method="bitfit",
        learning_rate=1e-3,
        seed=0,
        config={"epochs": 1.0},
        history=[{"epoch": 1.0, "step": 2, "train_loss": 0.7, "eval": {"accuracy": 0.5}}],
        metric="accuracy",
        metrics={"final": {"accuracy": 0.5}, "best": {"accuracy": 0.5}},
        best_epoch=1.0,
        trainable={"body": 10, "head": 5, "base": 1000},
        bytes=99,
        seconds=1.5,
        processor_seconds=1.2,
        data={"source": "local files", "rows": {"train": 8}},
    )


def test_a_record_survives_the_file(record, tmp_path):
    record.write(tmp_path / "deep" / "run.json")
    assert RunRecord.read(tmp_path / "deep" / "run.json") == record
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run.json"]
    assert {"python", "torch", "transformers", "bitfit-hf"} <= record.versions.keys()
    assert "15 parameters (1.50% of the base)" in summary(record)


def test_what_is_no_number_is_written_as_null(record, tmp_path):
    record.metrics["final"]["loss"] = math.nan
    record.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json").metrics["final"] == {"accuracy": 0.5, "loss": None}


def test_a_failed_write_leaves_the_old_record(record, tmp_path):
    record.write(tmp_path / "run.json")
    with pytest.raises(TypeError):
        replace(record, notes={"set": {1}}).write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json") == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "0"}, "`seed` must be a whole number, is '0'"),
        ({"seed": True}, "`seed` must be a whole number, is True"),
        ({"history": {}}, "`history` must be a list"),
        ({"dirty": 1}, "`dirty` must be true, false or null"),
        ({"metrics": {"final": {}}}, "`metrics` must hold final and best, holds final"),
        ({"colour": "red"}, "unknown `colour`"),
        ({"task": None, "bytes": None}, "`task` must be text, is None; `bytes` must be a whole number, is None"),
    ],
)
def test_a_file_that_is_no_record_is_refused(record, tmp_path, change, message):
    path = tmp_path / "run.json"
    record.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        RunRecord.read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_fields_and_damaged_files_are_refused(record, tmp_path):
    path = tmp_path / "run.json"
    for item in fields(RunRecord):
        record.write(path)
        values = json.loads(path.read_text())
        del values[item.name]
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=f"no `{item.name}`"):
            RunRecord.read(path)
    for text in ("", "{", "[]", '"x"'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a record"):
            RunRecord.read(path)


def test_no_path_of_the_machine_is_kept():
    config = {"data_dir": "/home/someone/data", "output_dir": "outputs/x", "names": ["~/a", "b"], "n": 3, "x": "../y"}
    assert without_paths(config) == {
        "data_dir": "<local path>",
        "output_dir": "outputs/x",
        "names": ["<local path>", "b"],
        "n": 3,
        "x": "<local path>",
    }


def test_the_commit_and_whether_the_code_differs(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        return subprocess.run(
            ["git", "-C", str(project), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    project = tmp_path / "project"
    (project / "recipes" / "results").mkdir(parents=True)
    monkeypatch.setattr(record_module, "PROJECT", project)
    assert checkout() == (None, None)
    (project / "recipes" / "glue.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "start")
    commit = git("rev-parse", "HEAD")
    assert checkout() == (commit, False)
    (project / "recipes" / "results" / "run.json").write_text("{}")  # a sweep's results do not make it dirty
    assert checkout() == (commit, False)
    (project / "recipes" / "new.py").write_text("b = 1\n")
    assert checkout() == (commit, True)
    (project / "recipes" / "new.py").unlink()
    (project / "recipes" / "glue.py").write_text("a = 2\n")
    assert checkout() == (commit, True)
    monkeypatch.setattr(record_module, "PROJECT", project / "recipes")  # a copy inside another checkout
    assert checkout() == (None, None)


# --- training --------------------------------------------------------------------------------------------------------


def test_the_batch_is_split_over_the_processes(tmp_path, monkeypatch):
    args = Arguments(output_dir=str(tmp_path), batch_size=16, lr_scheduler="constant")
    made = training_arguments(args)
    assert (made.per_device_train_batch_size, made.warmup_steps, made.average_tokens_across_devices) == (16, 0, False)
    assert training_arguments(Arguments(output_dir=str(tmp_path))).warmup_steps == 0.06
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="cannot be split over 3 processes"):
        training_arguments(args)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bitfitt", [], "--method bitfitt: There is no method 'bitfitt'. Choose from full, bitfit"),
        ("lora", ["depth=3"], "--method lora: .*unexpected keyword argument 'depth'"),
        ("lora", ["rank"], "--method lora: --method_options rank: not of the form name=value"),
    ],
)
def test_a_wrong_method_is_one_line(method, options, message):
    with pytest.raises(SystemExit, match=message):
        chosen_method(Arguments(method=method, method_options=options))


def test_rows_are_evaluated_in_their_order_although_training_batches_go_by_length(tmp_path):
    made = training_arguments(Arguments(output_dir=str(tmp_path)))
    assert made.train_sampling_strategy == "group_by_length"
    evaluation([]).on_train_begin(made, TrainerState(), TrainerControl())
    # Of the ways to order rows, the one by length is the only one that a Trainer also uses for evaluation.
    assert made.train_sampling_strategy == "sequential"


class CountingTrainer:
    """Stands in for a Trainer: the accuracy of the n-th evaluation is the n-th of a list."""

    def __init__(self, accuracies: list[float]) -> None:
        self.accuracies = accuracies
        self.compute_metrics = None
        self.asked: list[tuple[int, str]] = []

    def evaluate(self, rows: Dataset, metric_key_prefix: str) -> dict[str, float]:
        self.asked.append((len(rows), metric_key_prefix))
        value = self.accuracies[len([1 for _, prefix in self.asked if prefix == "eval"]) - 1]
        return {
            f"{metric_key_prefix}_accuracy": value,
            f"{metric_key_prefix}_runtime": 1.0,
            f"{metric_key_prefix}_samples_per_second": 1.0,
            "epoch": 1.0,
        }


def evaluation(accuracies: list[float], every: int = 1, **options) -> Evaluation:
    rows = Dataset.from_dict({"n": [1, 2, 3]})
    data = TaskData(
        name="t",
        train=rows,
        evaluation={"matched": Split(rows), "mismatched": Split(rows.select([0]))},
        metric="accuracy",
        collator=list,
        tokenizer=None,
        source="here",
        train_sample=Split(rows.select([0, 1])),
        **options,
    )
    made = Evaluation(data, every)
    made.trainer = CountingTrainer(accuracies)
    return made


def test_epochs_are_evaluated_but_the_last_which_comes_after_the_method_has_finished():
    made = evaluation([0.1, 0.5])
    state, control = TrainerState(max_steps=6), TrainerControl(should_log=False)
    for step in (2, 4, 6):
        state.global_step, state.epoch = step, step / 2
        made.on_epoch_end(None, state, control)
    assert [entry["step"] for entry in made.history] == [2, 4]
    assert control.should_log
    assert made.history[1]["eval"] == {"accuracy": 0.5, "mismatched_accuracy": 0.5}
    assert made.history[1]["train"] == {"accuracy": 0.5}
    assert made.trainer.asked[:3] == [(3, "eval"), (1, "eval_mismatched"), (2, "train_sample")]


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    made = evaluation([0.1, 0.2])
    drawn = []
    for seed in (0, 0, 1):
        made._epochs = 0
        for epoch in range(2):
            torch.rand(3 + len(drawn))  # what else a process draws
            made._epochs = epoch
            made.on_epoch_begin(SimpleNamespace(seed=seed), TrainerState(), TrainerControl())
            drawn.append(torch.randperm(1000)[:5].tolist())
    assert drawn[:2] == drawn[2:4]
    assert len({tuple(order) for order in drawn}) == 4


def test_every_second_epoch():
    made = evaluation([0.1, 0.5], every=2)
    state = TrainerState(max_steps=100)
    for step in range(1, 6):
        state.global_step = step
        made.on_epoch_end(None, state, TrainerControl())
    assert [entry["step"] for entry in made.history] == [2, 4]


@pytest.mark.parametrize(("greater", "expected"), [(True, 3), (False, 2)])
def test_the_best_epoch(greater, expected):
    values = [math.nan, 0.5, 0.2, 0.7, 0.7]
    made = evaluation(values, greater_is_better=greater)
    for step in range(len(values)):
        made.evaluate(TrainerState(max_steps=9, global_step=step))
    assert made.best()["step"] == expected
