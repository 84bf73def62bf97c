"""The serving recipe and its benchmark, on a tiny model."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import shlex
import statistics
from pathlib import Path

import pytest
import quickstart
import serve_many_tasks
import torch
from benchmarks import http_serving, serving
from common.load import Client, Outcome, arrivals, closed_loop, open_loop
from peft import get_peft_model
from serving_tester import served
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel, HfArgumentParser

from bitfit_hf import BiasDelta, BitFitConfig, TaskBank
from bitfit_hf.serving import Engine, Settings

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


def options(study_base, task_dir: Path) -> list[str]:
    return ["--task_dir", str(task_dir), "--model", study_base, "--copies", "3", "--clients", "8"]


@pytest.mark.slow  # a server in a process of its own
def test_a_mixed_stream_is_verified_while_tasks_come_and_go(study_base, task_dir, capsys, tmp_path):
    out = tmp_path / "verify.json"
    argv = [*options(study_base, task_dir), "--verify", "--requests", "600", "--rate", "300", "--output", str(out)]
    figures = serve_many_tasks.main(argv)
    assert (figures["wrong"], figures["lost"]) == (0, 0)
    assert figures["answered"] + figures["gone"] == 600
    assert figures["statuses"].keys() <= {"200", "404"}
    assert figures["answered"] > 380
    assert figures["changes"]["PUT 200"] > 2
    assert figures["memory"]["end"] > 1e7
    assert "0 mixed up, 0 lost" in capsys.readouterr().out
    assert str(task_dir) not in out.read_text()
    assert json.loads(out.read_text())["figures"]["lost"] == 0


def small_server(task_dir: Path, study_base: str):
    settings = Settings(base=study_base)
    bank = TaskBank(BertModel.from_pretrained(study_base), AutoTokenizer.from_pretrained(study_base))
    engine = Engine(bank, settings)
    for name in ("stance", "stance-0", "intent"):
        engine.tasks.add(name, str(task_dir / name.partition("-")[0]))
    return served(engine)


@pytest.mark.parametrize("more", [[], ["--rate", "400"]], ids=["closed", "open"])
def test_load_for_a_server_that_runs(study_base, task_dir, capsys, more):
    with small_server(task_dir, study_base) as url:
        figures = serve_many_tasks.main(["--url", url, "--requests", "60", *more])
    assert figures["statuses"] == {"200": 60}
    assert figures["tasks"] == 3
    assert 0 < figures["p50"] <= figures["p99"] < 30
    shown = capsys.readouterr().out
    assert "60 answers in" in shown
    assert "stance" in shown


def test_a_wrong_answer_and_a_lost_request_are_counted(study_base, task_dir):
    """The generator's own test: it has to see what it is there to find."""
    stream = serve_many_tasks.make_stream(
        serve_many_tasks.Arguments(requests=30), ["stance", "intent"], ["stance", "intent", "nowhere"]
    )
    gone = stream.names.count("nowhere")
    assert 0 < gone < 30
    seen: list[int] = []

    def check(number, answer):
        seen.append(number)
        labels = {row["label"] for row in answer}
        return all(label.startswith("stance") for label in labels)

    async def main(url: str) -> tuple[Outcome, Outcome]:
        client = Client(url)
        first = await open_loop(client, "/predict", stream.bodies(), rate=1000, check=check)
        await client.close()
        return first, await closed_loop(Client("http://127.0.0.1:9"), "/predict", [b"{}"] * 3, clients=2)

    with small_server(task_dir, study_base) as url:
        answered, nobody = asyncio.run(main(url))
    assert answered.statuses == {200: 30 - gone, 404: gone}
    assert sorted(answered.wrong) == [number for number, name in enumerate(stream.names) if name == "intent"]
    assert len(seen) == len(answered.latencies) == 30 - gone
    assert nobody.statuses == {0: 3}
    assert nobody.throughput == 0


def test_a_connection_that_the_server_has_let_go_of_is_not_used_again():
    async def answer_once(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def main() -> Outcome:
        async with await asyncio.start_server(answer_once, "127.0.0.1") as server:
            client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            return await open_loop(client, "/", [b""] * 3, rate=20)

    assert asyncio.run(main()).statuses == {200: 3}


def test_scores_are_compared():
    answer = [{"label": "a", "score": 0.7}, {"label": "b", "score": 0.3}]
    assert serve_many_tasks.same(answer, {"b": 0.3, "a": 0.70001})
    assert not serve_many_tasks.same(answer, {"b": 0.3, "a": 0.71})
    assert not serve_many_tasks.same(answer, {"a": 0.7})


def test_arrivals_are_a_poisson_process():
    times = list(arrivals(50.0, 4000, random.Random(0)))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.1)


def test_deltas_that_are_not_there_are_one_error(tmp_path, task_dir, monkeypatch):
    monkeypatch.setattr(quickstart, "main", lambda *_: pytest.fail("nothing is trained"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"no delta of stance and intent in nowhere\. Train .* first"):
        serve_many_tasks.main(["--task_dir", "nowhere"])
    assert list(tmp_path.iterdir()) == []
    assert set(serve_many_tasks.delta_folders(serve_many_tasks.Arguments(task_dir=str(task_dir)))) == {
        "stance",
        "intent",
    }


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


@pytest.mark.slow  # a server for all tasks, and one for each
def test_the_http_benchmark_writes_figures_and_a_plot(study_base, tmp_path):
    out = tmp_path / "results" / "http.json"
    sizes = "--tasks 2 --requests 40 --rounds 2 --shares 0.5 --clients 8 --systems bitfit merged".split()
    http_serving.main([*sizes, "--model", study_base, "--output", str(out)])
    text = out.read_text()
    assert study_base not in text
    (group,) = json.loads(text)["groups"]
    assert group["saturated"].keys() == {"bank", "bitfit", "merged"}
    assert group["saturated"]["bitfit"]["bitfit_is_faster_by"]["median"] == 1
    assert all(row["throughput"] > 0 for row in group["saturated"].values())
    assert {row["system"] for row in group["open_loop"]} == {"bitfit", "merged"}
    assert all(row["statuses"] == {"200": 80} for row in group["open_loop"])
    assert all(row["p99_in_batches"]["median"] > 0 for row in group["open_loop"])
    assert all(0 < row["p50"] <= row["p99"] for row in group["open_loop"])
    assert group["memory"]["merged"] > group["memory"]["bitfit"] > 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_http_benchmark_wants_bitfit_among_its_systems():
    for systems in (["merged"], ["bitfit", "apache"]):
        with pytest.raises(SystemExit, match="--systems are bitfit and"):
            http_serving.main(["--systems", *systems])


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


@pytest.mark.parametrize("module", [serve_many_tasks, serving, http_serving], ids=lambda module: module.__name__)
def test_the_commands_in_the_headers_parse(module):
    pattern = rf"^    python recipes/{module.__name__.replace('.', '/')}\.py([^#\n]*)(?:#.*)?$"
    commands = re.findall(pattern, module.__doc__, flags=re.MULTILINE)
    assert len(commands) == {"serve_many_tasks": 4}.get(module.__name__, 3)
    for command in commands:
        HfArgumentParser(module.Arguments).parse_args_into_dataclasses(shlex.split(command))


def test_the_client_reads_both_kinds_of_bodies():
    """Ray's proxy sends chunks; what is left of one answer would be taken for the next."""
    answers = [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1,\r\n2;name=x\r\n2]\r\n0\r\nTrailer: y\r\n\r\n",
        b"HTTP/1.1 429 Busy\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 204 Nothing\r\n\r\n",
    ]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
        writer.close()

    async def main() -> list[tuple[int, bytes]]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        found = [await client.request("GET", "/") for _ in answers]
        await client.close()
        server.close()
        return found

    assert asyncio.run(main()) == [(200, b"[1,2]"), (429, b"{}"), (200, b""), (204, b"")]
