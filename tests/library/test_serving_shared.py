"""Servers that share their tasks: what changes on one changes on all, whoever starts, fails or ends meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from bank_tester import bert_base, tokenizer
from serving_tester import ADMIN, client_of, close, text_for

from bitfit_hf import TaskBank
from bitfit_hf.errors import DeltaIOError, ServingError
from bitfit_hf.serving import Settings, shared
from bitfit_hf.serving.shared import Entry, SharedEngine, TaskLog, generation_of


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "WAIT", 0.05)
    monkeypatch.setattr(shared, "LOST", 0.2)


class Place:
    """A log, and servers that follow it; `log` may be put in the place of another."""

    def __init__(self, world: Path, *names: str, **settings: Any) -> None:
        self.world = world
        self.first = {name: str(world / "tasks" / name) for name in names}
        self.log = TaskLog(self.first)
        self.settings = settings
        self.engines: list[SharedEngine] = []

    def engine(self, first: dict[str, str] | None = None) -> SharedEngine:
        allowed = (str(self.world / "tasks"),)
        settings = Settings(base=str(self.world / "base"), admin_token="admin", allow_source=allowed, **self.settings)
        place = self

        class Current:
            """Whatever log is there at the moment."""

            def __getattr__(self, name: str) -> Any:
                return getattr(place.log, name)

        first = self.first if first is None else first
        self.engines.append(SharedEngine(TaskBank(bert_base(), tokenizer()), settings, first=first, log=Current))
        return self.engines[-1]

    @asynccontextmanager
    async def servers(self, count: int) -> AsyncIterator[list[httpx.AsyncClient]]:
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(client_of(self.engine(), headers=ADMIN)) for _ in range(count)]

    def known(self) -> list[list[str]]:
        return [[info.name for info in engine.tasks.infos()] for engine in self.engines]


async def put(client: httpx.AsyncClient, name: str, source: str | None = None) -> httpx.Response:
    return await client.put(f"/tasks/{name}", json={"source": source or name})


async def answer(client: httpx.AsyncClient, name: str, as_of: str | None = None) -> Any:
    return await client.post("/predict", json={"inputs": text_for(as_of or name, 3), "task": name})


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_what_changes_on_one_has_changed_on_all_when_it_is_answered(world, expected):
    place = Place(world, "sentiment")

    async def main() -> None:
        async with place.servers(3) as clients:
            assert place.known() == [["sentiment"]] * 3
            assert (await put(clients[0], "tags")).status_code == 201
            for client in clients:
                assert close((await answer(client, "tags")).json(), expected("tags", text_for("tags", 3)))
            assert (await put(clients[1], "tags", "topics")).status_code == 200
            for client in clients:
                found = await answer(client, "tags", "topics")
                assert close(found.json(), expected("topics", text_for("topics", 3)))
            assert (await clients[2].delete("/tasks/sentiment")).status_code == 204
            assert place.known() == [["tags"]] * 3
            assert [(await client.delete("/tasks/sentiment")).status_code for client in clients] == [404] * 3
            assert (await put(clients[0], "x", "../secret")).status_code == 403
            assert (await put(clients[0], "-x", "tags")).status_code == 422
            assert place.known() == [["tags"]] * 3

    asyncio.run(main())


def test_who_starts_later_has_what_was_changed_before(world):
    place = Place(world, "sentiment", "rating")

    async def main() -> None:
        async with place.servers(1) as (client,):
            await put(client, "tags")
            await client.delete("/tasks/rating")
            async with place.servers(1) as (later,):
                assert place.known() == [["sentiment", "tags"]] * 2
                await put(later, "topics")
                assert place.known() == [["sentiment", "tags", "topics"]] * 2

    asyncio.run(main())


def test_a_change_that_one_cannot_follow_is_taken_back_on_all(world, monkeypatch):
    place = Place(world, "sentiment")

    async def main() -> None:
        async with place.servers(2) as (client, other):
            assert (await put(client, "entails")).status_code == 201
            before = (await answer(other, "entails")).json()

            def fail(*_: Any, **__: Any) -> None:
                raise DeltaIOError(f"{world}: no such folder here")

            add = place.engines[1].tasks.add
            monkeypatch.setattr(place.engines[1].tasks, "add", fail)
            refused = await put(client, "tags")
            assert (refused.status_code, refused.json()["error_type"]) == (422, "Validation")
            assert str(world) not in refused.text
            replaced = await put(client, "entails", "sentiment")
            assert replaced.status_code == 422
            monkeypatch.setattr(place.engines[1].tasks, "add", add)
            await until(lambda: place.engines[0]._applied == place.engines[1]._applied == place.log._version)
            assert place.known() == [["sentiment", "entails"]] * 2
            for one in (client, other):
                assert close((await answer(one, "entails")).json(), before)
            assert (await put(client, "tags")).status_code == 201
            assert place.log._failures == {}

    asyncio.run(main())


def test_who_has_died_holds_nobody_up(world):
    place = Place(world, "sentiment")

    async def main() -> None:
        async with place.servers(2) as (client, _):
            following = place.engines[1]._following
            assert following is not None
            following.cancel()  # it is not heard of again
            response = await asyncio.wait_for(put(client, "tags"), 10)
            assert response.status_code == 201
            assert place.known() == [["sentiment", "tags"], ["sentiment"]]

    asyncio.run(main())


def test_who_loads_for_long_is_waited_for(world, monkeypatch):
    place = Place(world, "sentiment")

    async def main() -> None:
        async with place.servers(2) as (client, _):
            add, engine = place.engines[1]._add, place.engines[1]

            async def slowly(*args: Any) -> Any:
                await asyncio.sleep(4 * shared.LOST)
                return await add(*args)

            monkeypatch.setattr(engine, "_add", slowly)
            assert (await put(client, "tags")).status_code == 201
            assert place.known() == [["sentiment", "tags"]] * 2

    asyncio.run(main())


def test_a_change_that_takes_too_long_is_said_to(world, monkeypatch):
    place = Place(world, "sentiment")
    monkeypatch.setattr(shared, "SETTLE", 0.2)

    async def main() -> None:
        async with place.servers(2) as (client, _):

            async def never(*_: Any) -> Any:
                await asyncio.sleep(3600)

            monkeypatch.setattr(place.engines[1], "_add", never)
            response = await put(client, "tags")
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0

    asyncio.run(main())


def test_a_log_that_is_started_anew_learns_from_the_servers(world):
    place = Place(world, "sentiment", "rating")

    async def main() -> None:
        async with place.servers(2) as (client, other):
            await put(client, "tags")
            await client.delete("/tasks/rating")
            place.log = TaskLog(place.first)
            statuses = [(await put(client, "topics")).status_code]
            await until(lambda: place.log._version >= 4 and len(place.log._members) == 2)
            statuses.append((await put(other, "topics")).status_code)
            assert statuses in ([503, 201], [201, 200])
            async with place.servers(1):
                assert place.known() == [["sentiment", "tags", "topics"]] * 3

    asyncio.run(main())


def test_the_same_name_changed_on_two_at_once_ends_alike(world):
    place = Place(world, "sentiment")

    async def main() -> None:
        async with place.servers(2) as clients:
            for _ in range(2):
                await asyncio.gather(put(clients[0], "a", "tags"), put(clients[1], "a", "entails"))
                await until(lambda: place.engines[0]._applied == place.engines[1]._applied == place.log._version)
                kinds = {engine.tasks.info("a").type for engine in place.engines}  # type: ignore[union-attr]
                assert len(kinds) == 1

    asyncio.run(main())


def test_a_server_with_other_first_tasks_keeps_its_own(world):
    place = Place(world, "sentiment")
    assert generation_of({"a": "b"}) != generation_of({"a": "c"})

    async def main() -> None:
        async with place.servers(1) as (client,):
            engine = place.engines[0]
            place.log = TaskLog({"tags": str(world / "tasks" / "tags")})
            assert (await put(client, "topics")).status_code == 503
            await place.log.restore(engine._generation, 99, {"x": Entry(99, "x")})
            assert place.log._version == 1
            assert place.known() == [["sentiment"]]
            assert (await answer(client, "sentiment")).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("strict", [False, True])
def test_first_tasks_that_cannot_be_loaded(world, strict):
    place = Place(world, "sentiment", "nowhere", strict=strict)

    async def main() -> None:
        if strict:
            with pytest.raises(ServingError, match="nowhere"):
                await place.engine().start()
            assert place.log._members == {}
        else:
            async with place.servers(1):
                assert place.known() == [["sentiment"]]

    asyncio.run(main())


def test_the_default_task_may_be_removed_and_a_server_still_starts(world):
    place = Place(world, "sentiment", default_task="sentiment")

    async def main() -> None:
        async with place.servers(1) as (client,):
            assert (await client.delete("/tasks/sentiment")).status_code == 204
            async with place.servers(1):
                assert place.known() == [[], []]

    asyncio.run(main())
