"""Streams of requests: none is lost or has another's answer, whatever happens meanwhile; and where tasks come from."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_tester import ADMIN, ANSWERING, Expected, client_of, close, make_engine, served, text_for
from typer.testing import CliRunner

from bitfit_hf.cli import app as command_line
from bitfit_hf.serving.limits import Limits

ROOT = Path(__file__).resolve().parents[2]


def body(name: str, number: int) -> dict[str, Any]:
    return {"inputs": text_for(name, number), "task": name}


def test_a_cancellation_that_comes_together_with_the_body_is_obeyed():
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        reached.append(scope["path"])

    async def receive() -> dict[str, Any]:
        asyncio.get_running_loop().call_soon(lambda: None)
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        reached.append(message["type"])

    async def main(turns: int) -> bool:
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}
        request = asyncio.ensure_future(Limits(app, max_body_bytes=100)(scope, receive, send))
        for _ in range(turns):
            await asyncio.sleep(0)
        asked = request.cancel()
        await asyncio.wait([request])
        return request.cancelled() is asked

    assert all(asyncio.run(main(turns)) for turns in range(6))


def stream(count: int, seed: int) -> list[tuple[str, int]]:
    rng = random.Random(seed)
    return [(rng.choice(ANSWERING), rng.randrange(60)) for _ in range(count)]


def test_a_mixed_stream_with_cancellations(world, expected):
    """Hundreds of requests that arrive at random; some clients leave in the middle."""
    engine = make_engine(world, ANSWERING, max_batch_tokens=120)
    rng = random.Random(0)
    outcomes: Counter[str] = Counter()
    for name, number in stream(400, 1):  # computed in the loop they would hold up the server
        expected(name, text_for(name, number))

    async def one(client: httpx.AsyncClient, name: str, number: int) -> None:
        await asyncio.sleep(rng.random() * 0.5)
        request = asyncio.ensure_future(client.post("/predict", json=body(name, number)))
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random() * 0.02)
            outcomes["left"] += request.cancel()
        try:
            response = await request
        except asyncio.CancelledError:
            return
        assert response.status_code == 200
        assert close(response.json(), expected(name, text_for(name, number))), (name, number)
        outcomes["answered"] += 1

    async def main() -> str:
        async with client_of(engine) as client:
            await asyncio.gather(*(one(client, *item) for item in stream(400, 1)))
            return (await client.get("/metrics")).text

    metrics = asyncio.run(main())
    assert outcomes["answered"] + outcomes["left"] == 400
    assert outcomes["left"] > 20
    assert "te_queue_size 0.0" in metrics
    assert engine.accepted == engine.answered
    assert engine._under_way == 0
    batches = float(re.findall(r"^te_batch_next_size_count (\S+)", metrics, flags=re.MULTILINE)[0])
    mixed = float(re.findall(r"^bitfit_batch_tasks_sum (\S+)", metrics, flags=re.MULTILINE)[0])
    assert mixed / batches > 1.2


def under_change(world: Path, expected: Expected, count: int, clients: int) -> Counter[str]:
    """A stream against a real server while `tags` comes and goes, and `entails` is replaced by what answers alike and
    by what does not: an answer is always one of its own task's."""
    engine = make_engine(
        world, ANSWERING, admin_token="admin", allow_source=(str(world / "tasks"),), max_batch_tokens=200
    )
    done = threading.Event()

    # Each thread counts for itself: `+=` on what threads share loses counts.
    def change(address: str) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        with httpx.Client(base_url=address, headers=ADMIN, timeout=60) as admin:
            while not done.is_set():
                outcomes["removed"] += admin.delete("/tasks/tags").status_code == 204
                for name, source in (("tags", "tags"), ("entails", "sentiment"), ("entails", "entails")):
                    response = admin.put(f"/tasks/{name}", json={"source": source})
                    assert response.status_code in (200, 201), response.text
                    outcomes["put"] += 1
                time.sleep(0.02)
        return outcomes

    def ask(address: str, items: list[tuple[str, int]]) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        with httpx.Client(base_url=address, timeout=60) as client:
            for name, number in items:
                response = client.post("/predict", json=body(name, number))
                text = text_for(name, number)
                if response.status_code == 404:
                    assert name == "tags"
                    outcomes["gone"] += 1
                    continue
                assert response.status_code == 200, response.text
                allowed = [name, "sentiment"] if name == "entails" else [name]
                right = any(close(response.json(), expected(one, text)) for one in allowed)
                assert right, (name, text, response.json())
                outcomes["right"] += 1
        return outcomes

    items = stream(count, 2)
    for name, number in items:
        for one in (name, "sentiment"):
            expected(one, text_for(name, number))
    with served(engine) as address, ThreadPoolExecutor(clients + 1) as threads:
        admin = threads.submit(change, address)
        asking = [threads.submit(ask, address, items[start::clients]) for start in range(clients)]
        try:
            outcomes = sum((future.result(120) for future in asking), Counter())
        finally:
            done.set()
        outcomes += admin.result(60)
    assert engine.accepted == engine.answered
    return outcomes


def test_a_stream_while_tasks_come_and_go(world, expected):
    outcomes = under_change(world, expected, 240, 8)
    assert outcomes["right"] + outcomes["gone"] == 240, "0 mixed up, 0 lost"
    assert outcomes["put"] > 5
    assert outcomes["removed"] > 1


@pytest.mark.slow
def test_two_thousand_requests_while_tasks_come_and_go(world, expected):
    outcomes = under_change(world, expected, 2000, 16)
    assert outcomes["right"] + outcomes["gone"] == 2000, "0 mixed up, 0 lost"
    assert outcomes["put"] > 50


def test_more_tasks_than_memory(world, expected):
    engine = make_engine(world, ANSWERING, max_tasks=2)

    async def main() -> None:
        async with client_of(engine) as client:
            items = stream(60, 3)
            answers = await asyncio.gather(*(client.post("/predict", json=body(*item)) for item in items))
            for (name, number), answer in zip(items, answers, strict=True):
                assert close(answer.json(), expected(name, text_for(name, number)))
            assert (await client.get("/tasks")).json()[-1]["name"] == ANSWERING[-1]
            assert "bitfit_resident_tasks 2.0" in (await client.get("/metrics")).text

    asyncio.run(main())


def test_a_server_does_not_stop_to_look_through_what_it_has_loaded(world, monkeypatch):
    """A full garbage collection in the middle of the requests would take longer than some batches."""
    seen = []

    def serve(engine, listening, *, ready):
        listening.close()
        seen.append((engine.bank, any(one is engine.bank for one in gc.get_objects())))

    monkeypatch.setattr("bitfit_hf.serving.run.serve", serve)
    result = CliRunner().invoke(
        command_line, ["serve", str(world / "base"), "--tasks-dir", str(world / "tasks"), "--port", "0"]
    )
    assert result.exit_code == 0, result.output
    ((bank, collected),) = seen
    assert gc.is_tracked(bank)
    assert not collected


@pytest.mark.slow
def test_a_process_that_is_told_to_end_answers_what_it_has_accepted(world, expected):
    wanted = {(name, n): expected(name, text_for(name, n)) for name in ANSWERING for n in range(60)}
    command = [sys.executable, "-m", "bitfit_hf.cli", "serve", str(world / "base"), "--port", "0"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "BITFIT_SERVE_TASKS_DIR": str(world / "tasks"),
        "BITFIT_SERVE_TASK": f"broken={world / 'nowhere'}",
        "BITFIT_SERVE_MAX_WAIT_MS": "100",
        "BITFIT_SERVE_MAX_BATCH_TOKENS": "12",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=world
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"^Serving 7 tasks on base at (http://127\.0\.0\.1:\d+): entails, ", line)
        assert found, (line, process.stderr.read() if not line else "")

        def ask(seed: int) -> int:
            answered = 0
            with httpx.Client(base_url=found[1], timeout=60) as client:
                for name, number in stream(10_000, seed):
                    try:
                        response = client.post("/predict", json=body(name, number))
                    except httpx.TransportError:  # it no longer listens
                        break
                    if response.status_code == 503:  # it is ending, and has not accepted this one
                        break
                    assert response.status_code == 200, response.text
                    assert close(response.json(), wanted[name, number]), (name, number, response.json())
                    answered += 1
            return answered

        with ThreadPoolExecutor(8) as threads:
            asking = [threads.submit(ask, seed) for seed in range(8)]
            time.sleep(1.5)
            process.send_signal(signal.SIGTERM)
            answered = sum(future.result(60) for future in asking)
        rest, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        ended = re.search(r"Ended\. (\d+) of (\d+) accepted requests were answered\.", rest)
        assert ended, rest
        assert int(ended[1]) == int(ended[2]) == answered
        assert answered > 50
        assert "left out: broken" in errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
