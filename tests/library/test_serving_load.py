"""Many requests at once: none is lost, answered twice or with another's answer, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from serving_tester import client_of, close, make_engine, served, text_for

from bitfit_hf.serving.queue import BatchingQueue, Job
from bitfit_hf.serving.tokenizing import TokenizingThread

# --- the queue alone ---


class Text:
    """What the queue looks at in a text."""

    def __init__(self, length: int, task: str = "a", runs_with: Any = ("right", 0)) -> None:
        self.length = length
        self.runs_with = runs_with
        self.task = type("Task", (), {"name": task})


def batches_of(texts: list[Any], **options: Any) -> list[list[Any]]:
    """The batches that the queue makes of texts that are all there when it starts; each answer is its own text."""
    seen: list[list[Any]] = []

    def run(batch: list[Job]) -> list[Any]:
        seen.append([job.text for job in batch])
        return [job.text for job in batch]

    async def main() -> None:
        queue = BatchingQueue(run, **{"max_batch_tokens": 100, **options})
        jobs = [Job(text, lambda *_: None) for text in texts]
        waiting = asyncio.gather(*(queue.answers([job]) for job in jobs))
        await asyncio.sleep(0)
        queue.start()
        assert await waiting == [[text] for text in texts]
        await queue.stop()
        assert len(queue) == 0

    asyncio.run(main())
    assert sorted(id(text) for batch in seen for text in batch) == sorted(map(id, texts))
    return seen


def test_the_first_goes_first_with_those_of_like_length():
    lengths = [10, 50, 11, 48, 9, 49]
    seen = batches_of([Text(length) for length in lengths], max_batch_tokens=60)
    assert [[text.length for text in batch] for batch in seen] == [[10, 11, 9], [50], [48], [49]]
    assert all(len(batch) * max(text.length for text in batch) <= 60 for batch in seen)


def test_a_text_longer_than_the_budget_runs_alone():
    assert [len(batch) for batch in batches_of([Text(500), Text(3), Text(500)])] == [1, 1, 1]


def test_only_what_can_be_padded_together_runs_together():
    sides = [("right", 0), ("left", 0), (None, 3), (None, 3), ("right", 0), (None, 4)]
    seen = batches_of([Text(3, runs_with=side) for side in sides])
    assert [{text.runs_with for text in batch} for batch in seen] == [{side} for side in dict.fromkeys(sides)]
    assert [len(batch) for batch in seen] == [2, 1, 2, 1]


def test_texts_and_tasks_in_a_batch_are_limited():
    texts = [Text(2, task) for task in "abacab"]
    assert [len(batch) for batch in batches_of(texts, max_batch_requests=4)] == [4, 2]
    by_tasks = batches_of(texts, max_batch_tasks=2)
    assert [{text.task.name for text in batch} for batch in by_tasks] == [{"a", "b"}, {"c"}]
    assert [len(batch) for batch in by_tasks] == [5, 1]


def test_an_idle_queue_waits_for_others_and_no_longer():
    sizes: list[int] = []

    def run(batch: list[Job]) -> list[Any]:
        sizes.append(len(batch))
        return [None] * len(batch)

    async def main() -> float:
        queue = BatchingQueue(run, max_batch_tokens=100, max_wait=0.2)
        queue.start()
        start = time.perf_counter()
        one = asyncio.ensure_future(queue.answers([Job(Text(3), lambda *_: None)]))  # type: ignore[arg-type]
        await asyncio.sleep(0.02)
        await queue.answers([Job(Text(3), lambda *_: None)])  # type: ignore[arg-type]
        await one
        waited = time.perf_counter() - start
        start = time.perf_counter()
        await queue.answers([Job(Text(100), lambda *_: None)])  # type: ignore[arg-type]
        assert time.perf_counter() - start < 0.15, "a full batch waits for nobody"
        await queue.stop()
        return waited

    assert 0.19 < asyncio.run(main()) < 1
    assert sizes == [2, 1]


def test_a_text_that_is_being_tokenized_is_waited_for_a_little_longer():
    sizes: list[int] = []

    def run(batch: list[Job]) -> list[Any]:
        sizes.append(len(batch))
        return [None] * len(batch)

    async def main(comes: bool) -> None:
        queue = BatchingQueue(run, max_batch_tokens=100, max_wait=0.1)
        queue.start()
        one = asyncio.ensure_future(queue.answers([Job(Text(3), lambda *_: None)]))  # type: ignore[arg-type]
        queue.coming += 1
        await asyncio.sleep(0.2)
        queue.coming -= 1
        if comes:
            await queue.answers([Job(Text(3), lambda *_: None)])  # type: ignore[arg-type]
        await one
        await queue.stop()
        assert queue._tokens == 0

    asyncio.run(main(True))
    asyncio.run(main(False))
    assert sizes == [2, 1]


def test_the_tokenizing_thread_takes_all_that_waits_and_mixes_nothing_up():
    async def main() -> None:
        thread = TokenizingThread()
        threads: set[str] = set()
        go = threading.Event()

        def encode(number: int) -> int:
            threads.add(threading.current_thread().name)
            assert go.wait(10)
            if number % 7 == 3:
                raise ValueError(number)
            return number

        futures = [thread(lambda number=number: encode(number)) for number in range(50)]
        futures[20].cancel()
        go.set()
        results = await asyncio.gather(*futures, return_exceptions=True)
        for number, result in enumerate(results):
            if number == 20:
                assert isinstance(result, asyncio.CancelledError)
            elif number % 7 == 3:
                assert isinstance(result, ValueError)
                assert result.args == (number,)
            else:
                assert result == number
        assert threads == {"bitfit-tokenizing"}
        thread.close()
        assert all(one.name != "bitfit-tokenizing" for one in threading.enumerate())

    asyncio.run(main())


def test_an_error_reaches_who_asked_and_the_queue_goes_on():
    def run(batch: list[Job]) -> list[Any]:
        if any(job.text.length == 13 for job in batch):
            raise MemoryError("thirteen")
        return [ArithmeticError("seven") if job.text.length == 7 else job.text.length for job in batch]

    async def main() -> None:
        queue = BatchingQueue(run, max_batch_tokens=1)
        queue.start()
        lengths = [1, 7, 13, 2]
        asked = [queue.answers([Job(Text(n), lambda *_: None)]) for n in lengths]  # type: ignore[arg-type]
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [results[0], results[3]] == [[1], [2]]
        assert [type(results[1]), type(results[2])] == [ArithmeticError, MemoryError]
        await queue.stop()

    asyncio.run(main())


# --- the server ---


class Held:
    """A bank whose batches wait until they are let go."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()
        self.texts: list[Any] = []
        original = engine.bank.run

        def run(texts: Any) -> Any:
            self.texts += [text.text for text in texts]
            self.begun.set()
            assert self.go.wait(30)
            return original(texts)

        monkeypatch.setattr(engine.bank, "run", run)

    async def until_begun(self) -> None:
        while not self.begun.is_set():
            await asyncio.sleep(0.005)


def body(name: str, number: int) -> dict[str, Any]:
    return {"inputs": text_for(name, number), "task": name}


def test_a_full_server_says_so_and_a_client_that_leaves_frees_its_place(world, expected, monkeypatch):
    engine = make_engine(world, ["sentiment"], max_concurrent_requests=2)
    held = Held(engine, monkeypatch)

    async def main() -> None:
        async with client_of(engine) as client:
            running = asyncio.ensure_future(client.post("/predict", json=body("sentiment", 0)))
            await held.until_begun()
            leaving = asyncio.ensure_future(client.post("/predict", json=body("sentiment", 1)))
            await asyncio.sleep(0.05)
            full = await client.post("/predict", json=body("sentiment", 2))
            assert (full.status_code, full.json()["error_type"]) == (429, "Overloaded")
            assert int(full.headers["retry-after"]) >= 1
            assert (await client.get("/health")).status_code == 200
            leaving.cancel()
            await asyncio.sleep(0.05)
            next_one = asyncio.ensure_future(client.post("/predict", json=body("sentiment", 3)))
            await asyncio.sleep(0.05)
            held.go.set()
            assert close((await running).json(), expected("sentiment", text_for("sentiment", 0)))
            assert close((await next_one).json(), expected("sentiment", text_for("sentiment", 3)))
            assert (await client.post("/predict", json=body("sentiment", 2))).status_code == 200

    asyncio.run(main())
    asked = [text_for("sentiment", number) for number in (0, 3, 2)]
    assert held.texts == [tuple(text) if isinstance(text, list) else text for text in asked], "who left was not run"


def test_a_client_of_a_real_server_that_leaves_frees_its_place(world, monkeypatch):
    engine = make_engine(world, ["sentiment"], max_concurrent_requests=1)
    held = Held(engine, monkeypatch)
    with served(engine) as address, httpx.Client(base_url=address) as client:
        deadline = time.monotonic() + 10
        data = json.dumps(body("sentiment", 0)).encode()
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as leaving:
            head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            leaving.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            while engine.accepted == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        while 'te_request_failure{err="499",method="predict"} 1.0' not in client.get("/metrics").text:
            assert time.monotonic() < deadline  # on a busy machine it takes a while until the server notices
        held.go.set()
        while (last := client.post("/predict", json=body("sentiment", 1))).status_code == 429:
            assert time.monotonic() < deadline
        assert last.status_code == 200


def test_a_text_whose_task_is_replaced_again_and_again_is_answered(world, expected, monkeypatch):
    engine = make_engine(world, ["sentiment"])
    original, replaced = engine.bank.run, []

    def run(texts: Any) -> Any:
        if len(replaced) < 4:  # whenever the text is about to run
            engine.bank.add_task("sentiment", world / "tasks" / "sentiment", replace=True)
            replaced.append(1)
        return original(texts)

    monkeypatch.setattr(engine.bank, "run", run)

    async def main() -> httpx.Response:
        async with client_of(engine) as client:
            return await client.post("/predict", json=body("sentiment", 0))

    response = asyncio.run(main())
    assert response.status_code == 200, response.text
    assert close(response.json(), expected("sentiment", text_for("sentiment", 0)))
    assert len(replaced) == 4


def test_a_failing_model_is_424_and_spoils_no_other_answer(world, expected, monkeypatch):
    engine = make_engine(world, ["sentiment", "tags"], max_wait_ms=50)
    original = engine.bank.run

    def run(texts: Any) -> Any:
        if any(text.task.name == "tags" for text in texts):
            raise RuntimeError(f"out of memory in {world}")
        return original(texts)

    monkeypatch.setattr(engine.bank, "run", run)

    async def main() -> list[httpx.Response]:
        async with client_of(engine) as client:
            names = ["sentiment", "tags", "sentiment"]
            return await asyncio.gather(*(client.post("/predict", json=body(name, 0)) for name in names))

    good, bad, other = asyncio.run(main())
    for response in (good, other):
        assert close(response.json(), expected("sentiment", text_for("sentiment", 0)))
    assert (bad.status_code, bad.json()["error_type"]) == (424, "Backend")
    assert re.fullmatch(r"Inference failed \(number [0-9a-f]{8} in the log\)\.", bad.json()["error"])


def test_an_answer_that_is_not_finite_is_an_error(world, monkeypatch):
    engine = make_engine(world, ["sentiment"])
    original = engine.bank.run
    monkeypatch.setattr(
        engine.bank, "run", lambda texts: [{k: v * float("nan") for k, v in row.items()} for row in original(texts)]
    )

    async def main() -> list[int]:
        async with client_of(engine) as client:
            answers = [await client.post("/predict", json=body("sentiment", 0))]
            answers.append(await client.post("/embed", json={"inputs": "a"}))
            return [answer.status_code for answer in answers]

    assert asyncio.run(main()) == [424, 424]
