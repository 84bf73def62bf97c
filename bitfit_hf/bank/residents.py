"""Which tasks a bank has, which of them are in memory, and who is using them."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..delta.value import BiasDelta
from ..errors import TaskBankError
from ..storage.fetch import fetch_delta
from ..tuner.head import Labels
from .kinds import Kind
from .sites import Site


@dataclass
class Source:
    """Where a task's delta comes from, and comes from again when it has been dropped from memory.

    Args:
        delta ([`BiasDelta`], *optional*): The delta itself.
        place (`str`, *optional*): Else a folder or a Hub repo.
        options (`dict`): `revision`, `token` and the like.
    """

    delta: BiasDelta | None
    place: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None

    @classmethod
    def of(cls, source: BiasDelta | str | os.PathLike[str], options: dict[str, Any]) -> Source:
        """Describes what the user has given."""
        if isinstance(source, BiasDelta):
            given = sorted(name for name, value in options.items() if value)
            if given:
                raise TaskBankError(f"{', '.join(given)}: this is for a Hub repo, and a BiasDelta was given.")
            return cls(source)
        if not isinstance(source, (str, os.PathLike)):
            raise TaskBankError(
                "A task comes from a BiasDelta, a folder or a Hub repo; got "
                f"{type(source).__name__}. For a tuned model, pass `BiasDelta.from_model(model)`."
            )
        return cls(None, os.fspath(source), options)

    def keep(self) -> None:
        """Makes sure of a delta that may be asked for again: the user's own may be edited meanwhile."""
        self.delta = copy.deepcopy(self.delta)

    def release(self) -> None:
        """Lets go of a delta that will not be asked for again."""
        self.delta = None

    def read(self) -> BiasDelta:
        """Reads the delta; every time the same one.

        Raises:
            [`TaskBankError`]: It has changed since it was added.
            [`BitFitError`]: It cannot be read.
        """
        if self.delta is not None:
            return self.delta
        assert self.place is not None
        folder = fetch_delta(self.place, **self.options)
        if not os.path.isdir(self.place):
            # A branch may move on. The cache keeps each commit in a folder of its name, and finds it there without
            # asking the Hub.
            inside = Path(self.options["subfolder"] or "")
            commit = folder.parents[len(inside.parts) - 1] if inside.parts else folder
            self.options = {**self.options, "revision": commit.name}
        delta = BiasDelta.from_folder(folder, where=self.place)
        digest = delta.config.weights_digest or delta.digest
        if self.digest is not None and digest != self.digest:
            raise TaskBankError(
                f"{self.place} holds another delta than when it was added to the bank. Remove the task, and add it "
                "again."
            )
        self.digest = digest
        return delta


class Resident:
    """A task's deltas and head in memory.

    Args:
        rows (`Sequence[int]`): Its row in the table of each site, 0 where it has none.
        heads (`dict[str, nn.Module]`): Its head's leaf modules by path.
    """

    def __init__(self, rows: Sequence[int], heads: dict[str, nn.Module]) -> None:
        self.rows = tuple(rows)
        self.rows_tensor = torch.tensor(self.rows)
        self.heads = heads
        self.users = 0  # requests that run with it
        self.dropped = False  # its rows are given back when the last of them has ended

    @property
    def head_bytes(self) -> int:
        """Bytes of the head."""
        return sum(t.numel() * t.element_size() for leaf in self.heads.values() for t in leaf.state_dict().values())


@dataclass
class Task:
    """One task of a bank, in memory or not."""

    name: str
    source: Source
    kind: Kind
    labels: Labels | None
    pinned: bool = False
    resident: Resident | None = None
    delta: BiasDelta | None = None  # only while it is being added, when it has just been read
    used: int = 0  # the bank's clock when it was last asked for


class Residents:
    """The tasks of a bank.

    Two locks: `state` is held for moments only, to look names up, to count users, to swap a pointer; `writing` by
    whoever adds, removes or loads, one at a time, and never by a request whose tasks are in memory.

    A request holds what it uses: a task that is removed or dropped meanwhile keeps its rows until the request has
    ended, so no row ever changes its owner under a running request.

    Args:
        sites (`Sequence[Site]`): The base's sites.
        limit (`int`, *optional*): The most tasks in memory.
        load (`Callable`): Brings a task into memory.
    """

    def __init__(self, sites: Sequence[Site], limit: int | None, load: Callable[[Task], Resident]) -> None:
        self.tasks: dict[str, Task] = {}
        self.limit = limit
        self.writing = threading.RLock()
        self._state = threading.Condition(threading.Lock())
        self._sites = sites
        self._load = load
        self._occupied = 0  # tasks that have rows
        self._leaving = 0  # those of them that were dropped or removed while requests run with them
        self._clock = 0

    # --- requests ---

    @contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[dict[str, tuple[Task, Resident]]]:
        """Holds the tasks of a request in memory while the block runs.

        Args:
            names (`Sequence[str]`): Its tasks; `None` is nobody's.

        Raises:
            [`TaskBankError`]: A name is unknown, or there are more names than may be in memory.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        held: dict[str, tuple[Task, Resident]] = {}
        try:
            self._hold(wanted, held)
            yield held
        finally:
            with self._state:
                for _, resident in held.values():
                    resident.users -= 1
                    self._give_back_if_unused(resident)

    def _hold(self, wanted: Sequence[str], held: dict[str, tuple[Task, Resident]]) -> None:
        with self._state:
            tasks = self._look_up(wanted)
            if all(task.resident is not None for task in tasks):
                for task in tasks:
                    self._use(task, held)
                return
        if self.limit is not None and len(wanted) > self._room_beside_pinned(wanted):
            raise TaskBankError(
                f"This batch asks for {len(wanted)} tasks, and the bank keeps at most {self.limit} in memory, pinned "
                "ones included. Ask for fewer per call, or make it with a larger `max_tasks`."
            )
        with self.writing:
            for name in wanted:
                with self._state:
                    (task,) = self._look_up([name])
                    if task.resident is not None:
                        self._use(task, held)
                        continue
                self.bring_in(task, keep=held)
                with self._state:
                    self._use(task, held)

    def _look_up(self, names: Sequence[str]) -> list[Task]:
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise TaskBankError(
                f"The bank has no task {', '.join(map(repr, unknown[:8]))} (never added, or removed). It has "
                f"{len(self.tasks)}: {', '.join(map(repr, list(self.tasks)[:8]))}{', ...' * (len(self.tasks) > 8)}."
            )
        return [self.tasks[name] for name in names]

    def find(self, name: str) -> Task:
        """The task of that name.

        Raises:
            [`TaskBankError`]: There is none.
        """
        with self._state:
            return self._look_up([name])[0]

    def _use(self, task: Task, held: dict[str, tuple[Task, Resident]]) -> None:
        assert task.resident is not None
        self._clock += 1
        task.used = self._clock
        task.resident.users += 1
        held[task.name] = (task, task.resident)

    def _room_beside_pinned(self, wanted: Sequence[str]) -> int:
        assert self.limit is not None
        with self._state:
            return self.limit - sum(task.pinned and task.name not in wanted for task in self.tasks.values())

    # --- changes; all with `writing` held ---

    def bring_in(self, task: Task, keep: Container[str] = ()) -> None:
        """Loads a task, dropping others, those in `keep` excepted, where there are too many."""
        self._make_room(keep)
        with self._state:
            self._occupied += 1
        try:
            resident = self._load(task)
        except BaseException:
            with self._state:
                self._occupied -= 1
                self._state.notify_all()
            raise
        with self._state:
            self._clock += 1
            task.used = self._clock
            task.resident = resident

    def check_room(self) -> None:
        """Raises [`TaskBankError`] where all that are in memory have to stay."""
        if self.limit is not None and sum(task.pinned for task in self.tasks.values()) >= self.limit:
            raise TaskBankError(
                f"All {self.limit} tasks that the bank keeps in memory are pinned, so there is no room for another. "
                "Remove one, or make the bank with a larger `max_tasks`."
            )

    def _make_room(self, keep: Container[str]) -> None:
        if self.limit is None:
            return
        with self._state:
            while self._occupied >= self.limit:
                if self._occupied - self._leaving < self.limit:
                    # Running requests still hold what was dropped. Each ends without needing `writing`.
                    self._state.wait()
                    continue
                candidates = [t for t in self.tasks.values() if t.resident and not t.pinned and t.name not in keep]
                idle = [task for task in candidates if task.resident and not task.resident.users]
                self._drop(min(idle or candidates, key=lambda task: task.used))

    def _drop(self, task: Task) -> None:
        resident, task.resident = task.resident, None
        assert resident is not None
        resident.dropped = True
        self._leaving += 1
        self._give_back_if_unused(resident)

    def _give_back_if_unused(self, resident: Resident) -> None:
        if not resident.dropped or resident.users:
            return
        for site, row in zip(self._sites, resident.rows, strict=True):
            if row:
                site.give_back(row)
        resident.dropped = False
        self._leaving -= 1
        self._occupied -= 1
        self._state.notify_all()

    def enter(self, task: Task) -> None:
        """Makes a task, in memory already, known by its name."""
        with self._state:
            self.tasks[task.name] = task

    def remove(self, name: str) -> None:
        """Forgets a task."""
        with self.writing, self._state:
            (task,) = self._look_up([name])
            del self.tasks[name]
            if task.resident is not None:
                self._drop(task)

    def take_rows(self, tuned: Sequence[Site]) -> list[int]:
        """Reserves a row at each of the sites that a task tunes."""
        rows = [0] * len(self._sites)
        with self._state:
            for site in tuned:
                rows[site.number] = site.take()
        return rows

    def give_rows_back(self, rows: Sequence[int]) -> None:
        """Frees what [`~Residents.take_rows`] has reserved."""
        with self._state:
            for site, row in zip(self._sites, rows, strict=True):
                if row:
                    site.give_back(row)
