"""[`BatchingQueue`]: makes batches of the texts of many requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..bank import EncodedText

# Texts that are being tokenized are waited for so many times as long as others.
_PATIENCE = 4
# So many of the texts that wait are looked at to find those of like length.
_LOOKED_AT = 1024


@dataclass(eq=False)
class Job:
    """One text that waits for its answer.

    Args:
        text ([`EncodedText`]): The text.
        finish (`Callable`): Makes the answer of what its model returns; called in the thread that runs batches.
    """

    text: EncodedText
    finish: Callable[[EncodedText, dict[str, Any]], Any]
    arrived: float = field(default_factory=time.perf_counter)
    answer: asyncio.Future[Any] | None = None


class BatchingQueue:
    """
    Collects texts and runs them in batches, one batch at a time, in one thread.

    While a batch runs, texts collect; so under load batches are full, and a text that comes to an idle server waits
    for others no longer than `max_wait`, or a few times that for those that are all but here (`coming`). The text that
    has waited longest is always in the next batch, with those of like length that fit into the budget, whichever tasks
    they are for.

    A text leaves the queue in one of three ways: with its answer, with its error, or because who asked has gone.

    Args:
        run (`Callable`): Runs a batch: an answer, or an exception, for each job. It does not raise.
        max_batch_tokens (`int`): Tokens in a batch, padding included. A longer text runs alone.
        max_batch_requests (`int`, *optional*): Texts in a batch.
        max_batch_tasks (`int`, *optional*): Distinct tasks in a batch.
        max_wait (`float`): Seconds.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], list[Any]],
        *,
        max_batch_tokens: int,
        max_batch_requests: int | None = None,
        max_batch_tasks: int | None = None,
        max_wait: float = 0.0,
    ) -> None:
        self._run = run
        self._max_tokens = max_batch_tokens
        self._max_texts = max_batch_requests
        self._max_tasks = max_batch_tasks
        self._max_wait = max_wait
        self._waiting: dict[int, Job] = {}  # by the time of arrival
        self.coming = 0  # texts that are being made ready; who does that counts them here
        self._tokens = 0  # of those that wait
        self._arrived = asyncio.Event()
        self._hurry = asyncio.Event()  # set when a batch is full, or the queue is closing
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bitfit-inference")
        self._worker: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """Begins to run batches."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Runs what is waiting, and ends."""
        self._closing = True
        self._arrived.set()
        self._hurry.set()
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def answers(self, jobs: Sequence[Job]) -> list[Any]:
        """Waits for the answers to some texts; where one fails, its error is raised and the others are taken back."""
        loop = asyncio.get_running_loop()
        for job in jobs:
            job.answer = loop.create_future()
            self._waiting[id(job)] = job
            self._tokens += job.text.length
        self._arrived.set()
        if self._full():
            self._hurry.set()
        try:
            if len(jobs) == 1 and jobs[0].answer is not None:
                return [await jobs[0].answer]
            return await asyncio.gather(*(job.answer for job in jobs if job.answer is not None))
        finally:
            for job in jobs:
                self._drop(job)
                if job.answer is not None:
                    job.answer.cancel()

    def _drop(self, job: Job) -> None:
        if self._waiting.pop(id(job), None) is not None:
            self._tokens -= job.text.length

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
                continue
            await self._fill()
            batch = self._take()
            if not batch:
                continue
            try:
                outcomes = await loop.run_in_executor(self._thread, self._run, batch)
            except Exception as error:
                outcomes = [error] * len(batch)
            for job, outcome in zip(batch, outcomes, strict=True):
                if job.answer is None or job.answer.done():  # who asked has gone
                    continue
                if isinstance(outcome, Exception):
                    job.answer.set_exception(outcome)
                else:
                    job.answer.set_result(outcome)

    async def _fill(self) -> None:
        """Waits for others until the text that came first has waited long enough, or the batch is full."""
        while self._waiting and not self._closing and not self._full():
            first = next(iter(self._waiting.values()))
            wait = self._max_wait * (_PATIENCE if self.coming else 1)
            left = first.arrived + wait - time.perf_counter()
            if left <= 0:
                return
            self._hurry.clear()
            try:
                await asyncio.wait_for(self._hurry.wait(), min(left, self._max_wait))
            except asyncio.TimeoutError:
                continue

    def _full(self) -> bool:
        return self._tokens >= self._max_tokens or (
            self._max_texts is not None and len(self._waiting) >= self._max_texts
        )

    def _take(self) -> list[Job]:
        """The next batch."""
        if not self._waiting:
            return []
        candidates = list(self._waiting.values())[:_LOOKED_AT]
        first = candidates[0]
        like = [job for job in candidates if job.text.runs_with == first.text.runs_with]
        like.sort(key=lambda job: (job is not first, abs(job.text.length - first.text.length)))
        batch: list[Job] = []
        tasks: set[str | None] = set()
        longest = 0
        for job in like:
            longest = max(longest, job.text.length)
            name = job.text.task.name
            if batch and (len(batch) + 1) * longest > self._max_tokens:
                break
            if self._max_texts is not None and len(batch) >= self._max_texts:
                break
            if name is not None and name not in tasks and len(tasks) == self._max_tasks:
                longest = max(one.text.length for one in batch)
                continue
            batch.append(job)
            tasks |= {name} - {None}
        for job in batch:
            self._drop(job)
        return batch
