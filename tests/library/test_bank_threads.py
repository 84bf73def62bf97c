"""One bank, many threads: tasks come and go while requests run, and no answer is ever of the wrong task."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_tester import ATOL, KINDS, bert_base, random_delta, single_model

from bitfit_hf import BiasDelta, TaskBank, TaskBankError

THREADS = 8


class World:
    """A bank whose tasks change all the time, and the right answer for each name.

    A name always stands for the same delta, so an answer can be checked whatever happened since it was asked for.
    """

    def __init__(self, tmp_path: Path, *, max_tasks: int | None = None, numbers: int = 2) -> None:
        base = bert_base()
        self.bank = TaskBank(base, max_tasks=max_tasks)
        self.kinds = {f"{kind}-{number}": kind for number in range(numbers) for kind in KINDS}
        self.sources: dict[str, BiasDelta | Path] = {}
        self.batches = [self.batch(size, seed) for seed, size in enumerate((2, 3, 5, 8))]
        self.expected: dict[str | None, list[Any]] = {}
        models = {None: base}
        for number, (name, kind) in enumerate(self.kinds.items()):
            delta = random_delta(base, kind, seed=number)
            models[name] = single_model(base, delta, kind)
            self.sources[name] = delta
            if number % 2 or max_tasks is not None:
                delta.save_pretrained(tmp_path / name)
                self.sources[name] = tmp_path / name
        with torch.no_grad():
            self.expected = {name: [model(**batch) for batch in self.batches] for name, model in models.items()}
        self.stop = threading.Event()
        self.answers = self.refusals = self.changes = 0
        self.failures: list[str] = []
        self.lock = threading.Lock()

    @staticmethod
    def batch(size: int, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 60, (size, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, 5:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    def ask(self, seed: int) -> None:
        """A caller: random mixes until told to stop."""
        rng = random.Random(seed)
        names: list[str | None] = [None, *self.kinds]
        while not self.stop.is_set():
            number = rng.randrange(len(self.batches))
            tasks = rng.choices(names, k=len(self.batches[number]["input_ids"]))
            try:
                out = self.bank(**self.batches[number], tasks=tasks)
            except TaskBankError as error:
                with self.lock:
                    self.refusals += 1
                    if "The bank has no task" not in str(error):
                        self.failures.append(str(error))
                continue
            wrong = [task for example, task in enumerate(tasks) if not self.right(out[example], task, number, example)]
            with self.lock:
                self.answers += 1
                self.failures += [f"{task} got an answer that is not its own" for task in wrong]

    def right(self, answer: Any, task: str | None, number: int, example: int) -> bool:
        expected = self.expected[task][number]
        fields = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
        return set(answer) == set(fields) and all(
            answer[name].shape == expected[name][example].shape
            and (answer[name] - expected[name][example]).abs().max() <= ATOL
            for name in fields
        )

    def change(self, seed: int, names: list[str]) -> None:
        """Somebody who adds and removes tasks, the only one to touch `names`."""
        rng = random.Random(seed)
        while not self.stop.is_set():
            name = rng.choice(names)
            if name in self.bank:
                self.bank.remove_task(name)
            else:
                self.bank.add_task(name, self.sources[name])
            with self.lock:
                self.changes += 1

    def run(self, seconds: float, *, changing: bool = True) -> None:
        names = list(self.kinds)
        for name in names:
            self.bank.add_task(name, self.sources[name])
        with ThreadPoolExecutor(THREADS + 2) as pool:
            jobs = [pool.submit(self.ask, seed) for seed in range(THREADS)]
            if changing:
                jobs += [pool.submit(self.change, 100 + part, names[part::2]) for part in range(2)]
            time.sleep(seconds)
            patience = time.monotonic() + 60  # for a machine on which little has happened by now
            while not (self.failures or self.enough(changing)) and time.monotonic() < patience:
                time.sleep(0.1)
            self.stop.set()
            for job in jobs:
                job.result(timeout=120)
        assert not self.failures, self.failures[:5]
        assert self.enough(changing)

    def enough(self, changing: bool) -> bool:
        """Whether there is something to judge by."""
        return self.answers > 20 and (not changing or (self.changes > 10 and self.refusals > 0))

    def check_at_rest(self) -> None:
        """Nobody holds anything, every row has one owner, and what was reserved twice or lost would show."""
        tasks = self.bank._store.tasks.values()
        loaded = [task.loaded for task in tasks if task.loaded is not None]
        assert not any(task.users for task in loaded)
        assert self.bank._store._occupied == len(loaded)
        assert self.bank._store._leaving == 0
        for site in self.bank._base.sites:
            taken = [task.rows[site.number] for task in loaded if task.rows[site.number]]
            assert len(taken) == len(set(taken))
            assert sorted(taken + site._free) == list(range(1, site._next))


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_tasks_come_and_go_while_eight_threads_ask(tmp_path, seconds):
    world = World(tmp_path)
    world.run(seconds)
    assert world.changes > 10
    assert world.refusals > 0
    world.check_at_rest()


@pytest.mark.parametrize("seconds", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_tasks_are_dropped_and_read_again_while_eight_threads_ask(tmp_path, seconds):
    world = World(tmp_path, max_tasks=9)  # a batch asks for up to eight
    world.run(seconds, changing=False)
    assert world.refusals == 0
    world.check_at_rest()
    assert len(world.bank.resident_tasks) <= 9
    assert max(len(site.table) for site in world.bank._base.sites) <= 10


class Gate:
    """Holds the next request to a bank in the middle of its forward pass."""

    def __init__(self, bank: TaskBank) -> None:
        self._inside, self._go_on = threading.Event(), threading.Event()
        self._hook = bank._base.backbone.embeddings.register_forward_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self._inside.set()
        assert self._go_on.wait(60)

    def wait_for_request(self) -> None:
        """Returns when it is held; further requests are let through."""
        assert self._inside.wait(60)
        self._hook.remove()

    def open(self) -> None:
        """Lets it go on."""
        self._go_on.set()


def test_a_request_keeps_a_task_that_is_removed_while_it_runs(tmp_path):
    """Its row is not given to another before the request has ended."""
    world = World(tmp_path, numbers=1)
    bank, batch = world.bank, world.batches[0]
    names = ["sequence-2-0", "sequence-3-0", "sequence-7-0"]
    for name in names[:2]:
        bank.add_task(name, world.sources[name])
    gate = Gate(bank)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: bank(**batch, tasks=names[:2]))
        gate.wait_for_request()
        bank.remove_task(names[0])
        bank.add_task(names[2], world.sources[names[2]])  # would take the row that has become free
        bank.add_task(names[0], world.sources["multi-4-0"])  # the name stands for another delta from now on
        meanwhile = bank(**batch, tasks=[names[2], names[0]])
        gate.open()
        out = running.result(60)
    assert world.right(out[0], names[0], 0, 0)
    assert world.right(out[1], names[1], 0, 1)
    assert world.right(meanwhile[0], names[2], 0, 0)
    assert world.right(meanwhile[1], "multi-4-0", 0, 1)
    world.check_at_rest()


def test_a_full_bank_waits_for_a_request_to_end(tmp_path):
    """With room for two tasks, a request for two others waits until the running one lets go."""
    world = World(tmp_path, max_tasks=2, numbers=1)
    bank, batch = world.bank, world.batches[0]
    names = ["sequence-2-0", "sequence-3-0", "sequence-7-0", "token-4-0"]
    for name in names:
        bank.add_task(name, world.sources[name])
    gate = Gate(bank)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: bank(**batch, tasks=names[:2]))
        gate.wait_for_request()
        second = pool.submit(lambda: bank(**batch, tasks=names[2:]))
        base = bank(**batch, tasks=[None, None])  # whoever needs nothing from disk is not kept waiting
        time.sleep(0.2)
        assert not second.done()
        gate.open()
        answers = first.result(60), second.result(60)
    for out, tasks in zip(answers, (names[:2], names[2:]), strict=True):
        assert all(world.right(out[example], task, 0, example) for example, task in enumerate(tasks))
    assert world.right(base[0], None, 0, 0)
    world.check_at_rest()
