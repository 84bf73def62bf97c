"""Which tasks a bank has, which of them are in memory, and who is using them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..delta.value import BiasDelta
from ..errors import TaskBankError, UnknownTaskError
from ..tuner.head import Labels
from .sites import Site
from .source import DeltaSource
from .task_models import TaskModel


class LoadedTask:
    """A task's deltas and head in memory.

    Args:
        model ([`TaskModel`]): What it runs through.
        rows (`Sequence[int]`): Its row in the table of each site, 0 where it has none.
        head (`Mapping[str, nn.Module]`): Its head's leaf modules by path.
    """

    def __init__(self, model: TaskModel, rows: Sequence[int], head: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.rows = tuple(rows)
        self.rows_tensor = torch.tensor(self.rows)
        self.head = head
        self.users = 0  # requests that run with it
        self.dropped = False  # its rows are given back when the last of them has ended

    @property
    def head_bytes(self) -> int:
        """Bytes of the head."""
        return sum(t.numel() * t.element_size() for leaf in self.head.values() for t in leaf.state_dict().values())


@dataclass
class BankTask:
    """One task of a bank, in memory or not."""

    name: str
    source: DeltaSource
    model: TaskModel
    labels: Labels | None
    pinned: bool = False
    loaded: LoadedTask | None = None
    used: int = 0  # the bank's clock when it was last asked for


class TaskStore:
    """The tasks of a bank.

    Two locks: `state` is held for moments only, to look names up, to count users, to swap a pointer; `writing` by
    whoever adds, removes or loads, one at a time, and never by a request whose tasks are in memory.

    A request holds what it uses: a task that is removed or dropped meanwhile keeps its rows until the request has
    ended, so no row ever changes its owner under a running request.

    Args:
        sites (`Sequence[Site]`): The base's sites.
        limit (`int`, *optional*): The most tasks in memory.
        load (`Callable`): Brings a task into memory, given its delta.
    """

    def __init__(
        self, sites: Sequence[Site], limit: int | None, load: Callable[[TaskModel, BiasDelta], LoadedTask]
    ) -> None:
        self.tasks: dict[str, BankTask] = {}
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
    def using(
        self, names: Sequence[str | None], meant: Mapping[str, BankTask] | None = None
    ) -> Iterator[dict[str, LoadedTask]]:
        """Holds the tasks of a request in memory while the block runs.

        Args:
            names (`Sequence[str]`): Its tasks; `None` is nobody's.
            meant (`Mapping[str, BankTask]`, *optional*): What these names have to stand for.

        Raises:
            [`UnknownTaskError`]: A name is unknown, or stands for another task than is meant.
            [`TaskBankError`]: There are more names than may be in memory.
        """
        held: dict[str, LoadedTask] = {}
        try:
            self._hold(list(dict.fromkeys(name for name in names if name is not None)), meant or {}, held)
            yield held
        finally:
            with self._state:
                for loaded in held.values():
                    loaded.users -= 1
                    self._give_back_if_unused(loaded)

    def _hold(self, wanted: Sequence[str], meant: Mapping[str, BankTask], held: dict[str, LoadedTask]) -> None:
        with self._state:
            tasks = self._look_up(wanted, meant)
            if all(task.loaded is not None for task in tasks):
                for task in tasks:
                    self._use(task, held)
                return
            pinned_besides = sum(task.pinned and task.name not in wanted for task in self.tasks.values())
        if self.limit is not None and len(wanted) > self.limit - pinned_besides:
            raise TaskBankError(
                f"This batch asks for {len(wanted)} tasks, and the bank keeps at most {self.limit} in memory, pinned "
                "ones included. Ask for fewer per call, or make it with a larger `max_tasks`."
            )
        with self.writing:
            for name in wanted:
                with self._state:
                    (task,) = self._look_up([name], meant)
                if task.loaded is None:
                    self.bring_in(task, task.source.read, keep=held)
                with self._state:
                    self._use(task, held)

    def _look_up(self, names: Sequence[str], meant: Mapping[str, BankTask] | None = None) -> list[BankTask]:
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise UnknownTaskError(
                f"The bank has no task {', '.join(map(repr, unknown[:8]))} (never added, or removed). It has "
                f"{len(self.tasks)}: {', '.join(map(repr, list(self.tasks)[:8]))}{', ...' * (len(self.tasks) > 8)}."
            )
        replaced = [name for name, task in (meant or {}).items() if name in names and self.tasks[name] is not task]
        if replaced:
            raise UnknownTaskError(
                f"The task {', '.join(map(repr, replaced[:8]))} has been replaced since the text was encoded for it. "
                "Encode it again."
            )
        return [self.tasks[name] for name in names]

    def find(self, name: str) -> BankTask:
        """The task of that name.

        Raises:
            [`UnknownTaskError`]: There is none.
        """
        with self._state:
            return self._look_up([name])[0]

    def _use(self, task: BankTask, held: dict[str, LoadedTask]) -> None:
        assert task.loaded is not None
        self._clock += 1
        task.used = self._clock
        task.loaded.users += 1
        held[task.name] = task.loaded

    # --- changes; all with `writing` held ---

    def bring_in(self, task: BankTask, read: Callable[[], BiasDelta], keep: Container[str] = ()) -> None:
        """Loads a task, new or known, dropping others where there are too many. One that had its name is dropped too.

        Args:
            task ([`BankTask`]): The task; requests find it once it is in memory.
            read (`Callable`): Reads its delta.
            keep (`Container[str]`, *optional*): Names of those that are not dropped.
        """
        with self._state:
            self._make_room(keep)
            self._occupied += 1
        try:
            loaded = self._load(task.model, read())
        except BaseException:
            with self._state:
                self._occupied -= 1
                self._state.notify_all()
            raise
        with self._state:
            self._clock += 1
            task.used = self._clock
            task.loaded = loaded
            before = self.tasks.get(task.name)
            self.tasks[task.name] = task
            if before is not None and before is not task and before.loaded is not None:
                self._drop(before)

    def check_room(self) -> None:
        """Raises [`TaskBankError`] where all that are in memory have to stay."""
        if self.limit is not None and sum(task.pinned for task in self.tasks.values()) >= self.limit:
            raise TaskBankError(
                f"All {self.limit} tasks that the bank keeps in memory are pinned, so there is no room for another. "
                "Remove one, or make the bank with a larger `max_tasks`."
            )

    def _make_room(self, keep: Container[str]) -> None:
        while self.limit is not None and self._occupied >= self.limit:
            if self._occupied - self._leaving < self.limit:
                # Running requests still hold what was dropped. Each ends without needing `writing`.
                self._state.wait()
                continue
            candidates = [t for t in self.tasks.values() if t.loaded and not t.pinned and t.name not in keep]
            idle = [task for task in candidates if task.loaded and not task.loaded.users]
            self._drop(min(idle or candidates, key=lambda task: task.used))

    def _drop(self, task: BankTask) -> None:
        loaded, task.loaded = task.loaded, None
        assert loaded is not None
        loaded.dropped = True
        self._leaving += 1
        self._give_back_if_unused(loaded)

    def _give_back_if_unused(self, loaded: LoadedTask) -> None:
        if not loaded.dropped or loaded.users:
            return
        self._free(loaded.rows)
        loaded.dropped = False
        self._leaving -= 1
        self._occupied -= 1
        self._state.notify_all()

    def remove(self, name: str) -> None:
        """Forgets a task."""
        with self.writing, self._state:
            (task,) = self._look_up([name])
            del self.tasks[name]
            if task.loaded is not None:
                self._drop(task)

    # --- rows ---

    @contextmanager
    def new_rows(self, tuned: Sequence[Site]) -> Iterator[list[int]]:
        """Reserves a row at each of the sites that a task tunes; they are free again if the block fails."""
        rows = [0] * len(self._sites)
        with self._state:
            for site in tuned:
                rows[site.number] = site.take()
        try:
            yield rows
        except BaseException:
            with self._state:
                self._free(rows)
            raise

    def _free(self, rows: Sequence[int]) -> None:
        for site, row in zip(self._sites, rows, strict=True):
            if row:
                site.give_back(row)
