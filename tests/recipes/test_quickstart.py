"""The quickstart recipe: on a tiny model in seconds, on the real one (slow) with the figures that it promises."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
import quickstart
import synthetic_data
import torch
from common.metrics import metrics_with
from common.trivial import bag_of_words, majority
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
)

from bitfit_hf import BiasDelta

TINY_RUN = ["--epochs", "1", "--train_size", "24", "--eval_size", "12", "--batch_size", "8"]


@pytest.fixture(scope="module")
def glue_dir(tmp_path_factory):
    """Made-up rows in the columns of `nyu-mll/glue`, as gzip-compressed JSON lines."""
    rows = {
        "rte": [
            {"sentence1": f"The {word} is on the table.", "sentence2": f"There is a {word}.", "label": i % 2, "idx": i}
            for i, word in enumerate(["cup", "pen", "key", "map", "hat", "box", "jar", "can"] * 4)
        ],
        "stsb": [
            {"sentence1": f"He has {i} pens.", "sentence2": f"She has {i % 7} pens.", "label": float(i % 6), "idx": i}
            for i in range(32)
        ],
        "cola": [{"sentence": f"They saw {i} birds.", "label": i % 2, "idx": i} for i in range(32)],
    }
    folder = tmp_path_factory.mktemp("glue")
    for task, lines in rows.items():
        (folder / task).mkdir()
        for split in ("train", "validation"):
            with gzip.open(folder / task / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def test_generated_tasks_end_to_end(study_base, tmp_path, capsys):
    results = quickstart.main(["--model_name_or_path", study_base, "--output_dir", str(tmp_path), *TINY_RUN])

    assert [result.task for result in results] == ["stance", "intent"]
    for result in results:
        names = synthetic_data.LABELS[result.task]
        assert result.labels == len(names)
        assert result.majority == pytest.approx(1 / len(names), abs=0.1)
        assert 0 <= result.bag_of_words <= 1
        assert result.head == 16 * len(names) + len(names)
        assert result.bytes < 100_000
        assert (Path(result.folder) / "bias_change.png").read_bytes().startswith(b"\x89PNG")
        assert result.largest_logit_difference <= 2e-6
        delta = BiasDelta.from_pretrained(result.folder)
        assert (delta.num_parameters(), delta.num_parameters(head=True)) == (
            result.biases,
            result.biases + result.head,
        )
        assert any(tensor.abs().max() > 0 for tensor in delta.values()), "nothing was trained"
        loaded = AutoModelForSequenceClassification.from_pretrained(result.folder)
        assert tuple(loaded.config.id2label.values()) == names
    record = json.loads((tmp_path / "results.json").read_text())
    assert [entry["bitfit"] for entry in record["results"]] == [result.bitfit for result in results]
    assert record["arguments"]["train_size"] == 24
    shown = capsys.readouterr().out
    assert "bit-identical" in shown
    assert f'model="{results[0].folder}"' in shown
    assert shown.count(" → ") == 2
    assert f"bitfit inspect {results[0].folder}" in shown
    assert "First a baseline" in shown
    assert all(
        column in shown for column in ("trained", "on disk", "majority", "words", "untuned", "frozen", "BitFit")
    )
    assert "…" not in shown[shown.index("Before and after") : shown.index("All tasks on one base")]


@pytest.mark.parametrize(
    ("task", "labels", "metric"),
    [("rte", 2, "accuracy"), ("stsb", 1, "spearmanr"), ("cola", 2, "matthews_correlation")],
)
def test_local_glue_files(task, labels, metric, study_base, glue_dir, tmp_path):
    argv = ["--task", task, "--data_dir", str(glue_dir), "--model_name_or_path", study_base, *TINY_RUN]
    (result,) = quickstart.main([*argv, "--output_dir", str(tmp_path)])
    assert result.metric == metric
    loaded = AutoModelForSequenceClassification.from_pretrained(result.folder)
    assert loaded.config.num_labels == labels
    assert tuple(loaded.config.id2label.values())[: len(quickstart.GLUE[task][1])] == quickstart.GLUE[task][1]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (["--task", "stance", "sarcasm"], "--task sarcasm: choose from stance, intent, rte"),
        (["--epochs", "many"], "invalid float value: 'many'"),
    ],
)
def test_a_wrong_argument_is_one_line_before_any_work(argv, told, capsys):
    with pytest.raises(SystemExit) as ended:
        quickstart.main(argv)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_an_unknown_model_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"--model_name_or_path .*nowhere: this model cannot be loaded"):
        quickstart.main(["--model_name_or_path", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_most_frequent_label_and_a_bag_of_words():
    metrics = metrics_with("accuracy")
    assert majority([2, 1, 2, 0], [2, 2, 1, 0], metrics) == {"accuracy": 0.5}
    train = (["good and fine", "bad and poor"] * 4, [1, 0] * 4)
    assert bag_of_words(train, (["good fine", "poor", "bad"], [1, 0, 1]), metrics)["accuracy"] == pytest.approx(2 / 3)


def test_a_changed_demo_model_is_refused(monkeypatch):
    assert quickstart.demo_model().endswith("model")
    monkeypatch.setattr(quickstart, "DEMO_SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="reinstall"):
        quickstart.demo_model()


def test_models_that_differ_are_told_apart(study_base):
    model, other = (AutoModelForSequenceClassification.from_pretrained(study_base, num_labels=2) for _ in range(2))
    batch = {"input_ids": torch.tensor([[101, 2023, 102]])}
    other.load_state_dict(model.state_dict())
    assert quickstart.check_loaded(model, other, batch) <= 2e-6
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.bias[3] += 1e-6
    with pytest.raises(RuntimeError, match=r"layer\.1\.output\.dense\.bias"):
        quickstart.check_loaded(model, other, batch)


def test_the_commands_in_the_header_parse():
    commands = re.findall(r"^    python recipes/quickstart\.py(.*)$", quickstart.__doc__, flags=re.MULTILINE)
    assert len(commands) == 4
    parser = HfArgumentParser(quickstart.QuickstartArguments)
    parsed = [parser.parse_args_into_dataclasses(shlex.split(command))[0] for command in commands]
    known = {*quickstart.GENERATED_ROWS, *quickstart.GLUE}
    assert all(set(args.task) <= known for args in parsed)


@pytest.mark.slow
def test_bitfit_learns_what_a_frozen_body_and_a_bag_of_words_do_not(tmp_path):
    from test_synthetic_data import BAG_OF_WORDS_BOUNDS

    results = {result.task: result for result in quickstart.main(["--output_dir", str(tmp_path)])}
    assert set(results) == {"stance", "intent"}
    for task, result in results.items():
        chance = 1 / len(synthetic_data.LABELS[task])
        assert result.biases == 26_112 - 384  # the pooler, never trained, is in the head
        assert abs(result.untuned - chance) < 0.12
        assert 0.8 <= result.bitfit <= 0.99
        assert result.bitfit > result.frozen + 0.25
        assert result.bitfit > BAG_OF_WORDS_BOUNDS[task] + 0.05
        assert result.bytes < 800_000
