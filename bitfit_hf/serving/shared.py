"""Tasks that several servers share: [`TaskLog`] says which there are, and each [`SharedEngine`] follows it.

Nothing here knows how a server reaches the log: [`ray`](ray.py) has one in a process of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from ..bank import TaskBank
from ..errors import ServingError
from . import problems
from .embedding import Pooling
from .engine import Engine
from .problems import Problem
from .schemas import TaskDescription
from .settings import TASK_NAME, Settings
from .start import check_loaded

Result = TypeVar("Result")

WAIT = 5.0  # seconds that a server waits at the log for news; it is heard of at least that often
LOST = 30.0  # seconds after which a server that is not heard of counts no more
SETTLE = 120.0  # seconds that a change may take to reach all servers


@dataclass(frozen=True)
class Entry:
    """What the log says about a task's name.

    Args:
        version (`int`): The number of the change that said it: 1, 2, …
        place (`str`, *optional*): Folder or Hub repo of its delta; `None`: it was removed.
        revision (`str`, *optional*): Of the repo.
    """

    version: int
    place: str | None
    revision: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why a server could not follow a change: what a [`Problem`] says, as it travels between processes."""

    status: int
    error: str
    error_type: str


class Log(Protocol):
    """What servers ask of a [`TaskLog`], wherever it is."""

    def follow(
        self, generation: str, server: str, applied: int, failures: dict[int, Failure]
    ) -> Awaitable[tuple[int, dict[str, Entry]]]: ...

    def alive(self, server: str) -> Awaitable[None]: ...

    def leave(self, server: str) -> Awaitable[None]: ...

    def change(
        self, server: str, name: str, place: str | None, revision: str | None
    ) -> Awaitable[tuple[int, Entry | None]]: ...

    def settled(self, version: int) -> Awaitable[Failure | None]: ...

    def withdraw(self, name: str, version: int, before: Entry | None) -> Awaitable[None]: ...

    def restore(self, generation: str, version: int, entries: dict[str, Entry]) -> Awaitable[None]: ...


def generation_of(first: Mapping[str, str]) -> str:
    """Stands for the tasks that an application starts with. Servers and a log with others belong to another one."""
    return hashlib.sha256(json.dumps(sorted(first.items())).encode()).hexdigest()[:16]


class TaskLog:
    """
    The one place that says which tasks there are. All of it runs in one event loop.

    Each change has a number. A server that has followed all of them is a member, and from then on a change is done
    when every member has followed it. A log that was started anew gets what it knew from the first server that knows
    more.

    Args:
        first (`Mapping[str, str]`): The tasks to start with: their sources by their names.
    """

    def __init__(self, first: Mapping[str, str]) -> None:
        self._generation = generation_of(first)
        self._entries = {name: Entry(number, place) for number, (name, place) in enumerate(first.items(), 1)}
        self._version = len(first)
        self._members: dict[str, tuple[int, float]] = {}  # what each has followed, and when it was last heard of
        self._failures: dict[int, Failure | None] = {}  # of the changes that somebody waits for
        self._news = asyncio.Condition()

    async def follow(
        self, generation: str, server: str, applied: int, failures: dict[int, Failure]
    ) -> tuple[int, dict[str, Entry]]:
        """Tells what a server has followed, and waits for more.

        Args:
            generation (`str`), server (`str`): Who asks.
            applied (`int`): The last change that it has followed, or tried to.
            failures (`dict[int, Failure]`): The changes since it last asked that it could not follow.

        Returns:
            `tuple[int, dict[str, Entry]]`: The last change that there is, and what changes since `applied` say. A
            number that is below `applied` means that the log has forgotten what it knew, see `restore`.
        """
        if generation != self._generation:  # a server that is being replaced: it keeps the tasks that it has
            await asyncio.sleep(WAIT)
            return applied, {}
        async with self._news:
            self._failures |= {number: why for number, why in failures.items() if number in self._failures}
            if server in self._members or applied == self._version:
                self._members[server] = (applied, time.monotonic())
                self._news.notify_all()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait_for(lambda: self._version != applied), WAIT)
            await self.alive(server)
            return self._version, {name: e for name, e in self._entries.items() if e.version > applied}

    async def alive(self, server: str) -> None:
        """A server is still at it: loading a task from afar takes long."""
        if server in self._members:
            self._members[server] = (self._members[server][0], time.monotonic())

    async def leave(self, server: str) -> None:
        """A server ends; nobody waits for it any more."""
        async with self._news:
            self._members.pop(server, None)
            self._news.notify_all()

    async def change(
        self, server: str, name: str, place: str | None, revision: str | None
    ) -> tuple[int, Entry | None]:
        """Adds, replaces or removes (`place=None`) a task.

        Returns:
            `tuple[int, Entry | None]`: The number of the change, and what was there before.

        Raises:
            [`ServingError`]: The server that asks is no member: it is being replaced, or the log is started anew.
        """
        async with self._news:
            if server not in self._members:
                raise ServingError("This server does not follow the tasks of the others (yet, or any more).")
            before = self._entries.get(name)
            self._say(name, Entry(0, place, revision))
            self._failures[self._version] = None
            return self._version, before

    async def settled(self, version: int) -> Failure | None:
        """Waits until every member has followed a change, and returns why one could not. Asked once for each change.

        Raises:
            `TimeoutError`: A member takes too long.
        """
        deadline = time.monotonic() + SETTLE
        async with self._news:
            while True:
                now = time.monotonic()
                self._members = {name: (at, seen) for name, (at, seen) in self._members.items() if now - seen < LOST}
                if all(applied >= version for applied, _ in self._members.values()):
                    break
                if now > deadline:
                    del self._failures[version]
                    raise TimeoutError(f"Change {version} has not reached all servers in {SETTLE:.0f} s.")
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._news.wait(), min(1.0, LOST))
            return self._failures.pop(version)

    async def withdraw(self, name: str, version: int, before: Entry | None) -> None:
        """Says again what was said before a change, unless somebody has said something else since."""
        async with self._news:
            if self._entries[name].version == version:
                self._say(name, before or Entry(0, None))

    async def restore(self, generation: str, version: int, entries: dict[str, Entry]) -> None:
        """Takes over what a server knows, where that is more."""
        async with self._news:
            if generation == self._generation and version > self._version:
                self._version, self._entries = version, {**self._entries, **entries}
                self._news.notify_all()

    def _say(self, name: str, entry: Entry) -> None:
        self._version += 1
        self._entries[name] = replace(entry, version=self._version)
        self._news.notify_all()


class SharedEngine(Engine):
    """
    An engine whose tasks are those of a log. What changes on one changes on all, before the client has its answer.

    Args:
        bank ([`TaskBank`]), settings ([`Settings`]), pooling (`str`, *optional*): As for an [`Engine`].
        first (`Mapping[str, str]`): The tasks to start with, as the log got them.
        log (`Callable`): Finds the log; called when the engine starts.
    """

    def __init__(
        self,
        bank: TaskBank,
        settings: Settings,
        *,
        first: Mapping[str, str],
        log: Callable[[], Log],
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(bank, settings, pooling=pooling)
        self._first = len(first)
        self._generation = generation_of(first)
        self._find_log = log
        self._name = secrets.token_hex(8)
        self._applied = 0
        self._entries: dict[str, Entry] = {}
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Follows the log to its end, then begins to answer.

        Raises:
            [`ServingError`]: The tasks to start with cannot be loaded, see [`load_engine`].
        """
        await super().start()
        self.running = False
        self._log = self._find_log()
        try:
            failures: dict[int, Failure] = {}
            while True:
                version, entries = await self._log.follow(self._generation, self._name, self._applied, {})
                if version == self._applied:
                    break
                failures |= await self._apply(version, entries)
            if self._applied == self._first:  # later, tasks are what their administrator has made of them
                lines = [
                    f"{name}: {failures[e.version].error}"
                    for name, e in self._entries.items()
                    if e.version in failures
                ]
                check_loaded(self, asked=self._first, problems=lines)
        except BaseException:
            await self._log.leave(self._name)
            await super().stop()
            raise
        self._following = asyncio.get_running_loop().create_task(self._follow())
        self.running = True

    async def stop(self) -> None:
        """Leaves the log, answers what has been accepted, and ends."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
            try:
                await asyncio.wait_for(asyncio.ensure_future(self._log.leave(self._name)), WAIT)
            except Exception as error:  # the log may have ended first
                problems.logged(error, "The server left without a word", trace=False)
        await super().stop()

    async def _follow(self) -> None:
        failures: dict[int, Failure] = {}
        while True:
            try:
                version, entries = await self._log.follow(self._generation, self._name, self._applied, failures)
                failures = {}
                if version < self._applied:
                    await self._log.restore(self._generation, self._applied, self._entries)
                else:
                    failures = await self._heard(self._apply(version, entries))
            except Exception as error:  # the log is started anew, or cannot be reached; its tasks are served meanwhile
                problems.logged(error, "The log of tasks did not answer", trace=False)
                await asyncio.sleep(1)

    async def _heard(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Waits for `work`, and is heard of at the log meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=WAIT))[0]:
                await self._log.alive(self._name)
            return task.result()
        finally:
            task.cancel()

    async def _apply(self, version: int, entries: Mapping[str, Entry]) -> dict[int, Failure]:
        """Does what the log says, in its order; returns what could not be done."""
        failures = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1].version):
            try:
                if entry.place is not None:
                    await self._add(name, entry.place, entry.revision)
                elif name in self.tasks:
                    await super().remove_task(name)
            except Problem as problem:
                failures[entry.version] = Failure(problem.status, problem.error, problem.error_type)
            self._entries[name] = entry
        self._applied = version
        return failures

    async def add_task(self, name: str, source: str, revision: str | None) -> tuple[TaskDescription, bool]:
        """Adds or replaces a task on all servers; where one of them cannot, all are as they were.

        Args:
            name (`str`), source (`str`), revision (`str`, *optional*): As for an [`Engine`].

        Raises:
            [`Problem`]: As there; or it takes too long.
        """
        allowed = self.sources.check(source, revision)
        if not TASK_NAME.fullmatch(name):  # the log holds only what a server may be able to do
            return await self._add(name, allowed.place, allowed.revision)
        before = await self._on_all(name, allowed.place, allowed.revision)
        info = self.tasks.info(name)
        if info is None:  # removed by somebody else meanwhile
            raise problems.unknown_task(name)
        return info, before is None or before.place is None

    async def remove_task(self, name: str) -> None:
        """Removes a task from all servers.

        Raises:
            [`Problem`]: There is none; or it takes too long.
        """
        if name not in self.tasks:
            raise problems.unknown_task(name)
        await self._on_all(name, None, None)

    async def _on_all(self, name: str, place: str | None, revision: str | None) -> Entry | None:
        try:
            version, before = await self._log.change(self._name, name, place, revision)
            failure = await self._log.settled(version)
            if failure is not None:
                await self._log.withdraw(name, version, before)
        except Exception as error:
            number = problems.logged(error, f"The task {name} did not reach all servers")
            raise Problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"The change has not reached all servers (number {number} in the log); ask again.",
                problems.UNHEALTHY,
                retry_after=5,
            ) from error
        if failure is not None:
            raise Problem(failure.status, failure.error, failure.error_type)
        return before
