"""The serving recipe and its benchmark, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import threading
from pathlib import Path

import pytest
import quickstart
import serve_many_tasks
import torch
from benchmarks import serving
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel, HfArgumentParser

from bitfit_hf import BiasDelta, BitFitConfig, TaskBank, TaskBankError

RECIPES = Path(serve_many_tasks.__file__).parent


@pytest.fixture(scope="module")
def task_dir(study_base, tmp_path_factory) -> Path:
    """A delta for each of the quickstart's tasks, with random values."""
    folder = tmp_path_factory.mktemp("tasks")
    for seed, (task, labels) in enumerate([("stance", 3), ("intent", 6)]):
        names = dict(enumerate(f"{task}{index}" for index in range(labels)))
        stock = AutoModelForSequenceClassification.from_pretrained(study_base, id2label=names)
        tuned = get_peft_model(stock, BitFitConfig())
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "default" in name.split("."):
                    parameter.normal_(std=0.2)
        BiasDelta.from_model(tuned).save_pretrained(folder / task)
    return folder


def test_a_mixed_stream_is_answered_as_by_single_models(study_base, task_dir, capsys):
    argv = ["--task_dir", str(task_dir), "--model", study_base, "--copies", "3", "--requests", "40", "--clients", "8"]
    assert serve_many_tasks.main(argv) <= 1e-5
    shown = capsys.readouterr().out
    assert "8 tasks in" in shown
    assert "40 requests for" in shown


def test_tasks_that_are_missing_are_trained_first(study_base, task_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(quickstart, "main", asked.append)
    (tmp_path / "stance").symlink_to(task_dir / "stance")
    folders = serve_many_tasks.delta_folders(serve_many_tasks.Arguments(task_dir=str(tmp_path), model=study_base))
    assert folders["intent"] == tmp_path / "intent"
    assert asked == [["--task", "intent", "--output_dir", str(tmp_path), "--model_name_or_path", study_base]]
    serve_many_tasks.delta_folders(serve_many_tasks.Arguments(task_dir=str(task_dir)))
    assert len(asked) == 1


def test_one_bad_request_does_not_spoil_a_batch(study_base, task_dir):
    bank = TaskBank(BertModel.from_pretrained(study_base), AutoTokenizer.from_pretrained(study_base))
    bank.add_task("stance", task_dir / "stance")
    requests = serve_many_tasks.BatchingQueue(bank, wait=0.5)
    futures = [requests.ask("a good tent", task) for task in ("stance", "gone", "stance")]
    with pytest.raises(TaskBankError, match="no task 'gone'"):
        futures[1].result(30)
    assert futures[0].result(30) == futures[2].result(30)
    assert futures[0].result()["label"].startswith("stance")
    requests.close()
    assert not any(thread is requests._thread for thread in threading.enumerate())


def test_the_queue_fills_batches(study_base, task_dir):
    bank = TaskBank(BertModel.from_pretrained(study_base), AutoTokenizer.from_pretrained(study_base))
    bank.add_task("stance", task_dir / "stance")
    requests = serve_many_tasks.BatchingQueue(bank, batch_size=4, wait=0.5)
    for future in [requests.ask("a good tent", "stance") for _ in range(8)]:
        future.result(30)
    requests.close()
    assert requests.sizes == {4: 2}


def test_the_benchmark_writes_figures_and_a_plot(study_base, tmp_path):
    out = tmp_path / "results" / "serve.json"
    options = ["--tasks", "1", "4", "--shapes", "1x4", "3x5", "--rounds", "2", "--warmup", "0", "--bert_tasks", "0"]
    serving.main([*options, "--merged_models", "2", "--model", study_base, "--output", str(out)])
    record = json.loads(out.read_text())
    rows = record["throughput"]
    assert {row["system"] for row in rows} == {"base", "bank", "merged", "lora"}
    assert len(rows) == 4 * 2 * 2
    assert all(row["throughput_of_base"]["median"] == 1 for row in rows if row["system"] == "base")
    assert all(row["bank_is_faster_by"]["median"] == 1 for row in rows if row["system"] == "bank")
    (memory,) = record["memory"]
    assert memory["count"] == 4
    assert memory["bytes_per_task"] == memory["tasks"] / 4
    assert record["adding"]["tasks"] == 4
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_every_system_of_the_benchmark_answers_for_its_tasks(study_base):
    """What is timed does what it says: each example is computed with its own task."""
    systems = serving.Systems(study_base, 4)
    systems.grow(3)
    ids = torch.randint(1000, 2000, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        bank = systems.runners["bank"](batch, ["task-0", "task-1", "task-2", "task-1"])
        for example, number in enumerate([0, 1, 2, 1]):
            merged = systems.merged[number](**batch).logits[example]
            torch.testing.assert_close(bank.logits[example], merged, rtol=0, atol=1e-5)
        one, two = (systems.runners["lora"](batch, [name] * 4).logits for name in ("task-1", "task-2"))
        assert torch.isfinite(one).all()
        assert torch.isfinite(two).all()
        rows = {name: [i for i in range(4) if i % 3 == name] for name in range(3)}
        seen = []
        for model in systems.merged:
            model.register_forward_hook(
                lambda _, __, kwargs, ___: seen.append(len(kwargs["input_ids"])), with_kwargs=True
            )
        systems.runners["merged"](batch, [f"task-{i % 3}" for i in range(4)])
        assert sorted(seen) == sorted(len(where) for where in rows.values())


@pytest.mark.parametrize("module", [serve_many_tasks, serving], ids=lambda module: module.__name__)
def test_the_commands_in_the_headers_parse(module):
    pattern = rf"^    python recipes/{module.__name__.replace('.', '/')}\.py([^#\n]*)(?:#.*)?$"
    commands = re.findall(pattern, module.__doc__, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        HfArgumentParser(module.Arguments).parse_args_into_dataclasses(shlex.split(command))
