"""[`Engine`]: a bank behind a queue. It knows texts and tasks, and nothing of HTTP."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from ..bank import EncodedText, TaskBank
from ..errors import BitFitError, TaskBankError, UnknownTaskError
from ..terms.tasks import FEATURE_EXTRACTION, SEQUENCE_CLASSIFICATION
from . import problems
from .embedding import Pooling, embedding
from .metrics import Metrics
from .problems import Problem
from .queue import BatchingQueue, Job
from .schemas import TaskDescription, Text
from .settings import Settings
from .sources import AllowedSources
from .tasks import ServedTasks
from .tokenizing import TokenizingThread

Result = TypeVar("Result")


class Engine:
    """
    Answers texts of many tasks, and changes the tasks while it does.

    Args:
        bank ([`TaskBank`]): With a tokenizer. Its tasks are added through [`Engine.tasks`].
        settings ([`Settings`]): The limits.
        pooling (`str`, *optional*, defaults to `"mean"`): How an embedding is made of a text's tokens.
    """

    def __init__(self, bank: TaskBank, settings: Settings, *, pooling: Pooling = "mean") -> None:
        self.bank = bank
        self.settings = settings
        self.pooling: Pooling = pooling
        self.tasks = ServedTasks(bank)
        self.sources = AllowedSources(settings.allow_source)
        self.metrics = Metrics()
        self.running = False
        self.accepted = self.answered = 0
        self._under_way = 0
        self._queue: BatchingQueue | None = None
        self._tokenizing: TokenizingThread | None = None
        self._changing: ThreadPoolExecutor | None = None
        self.metrics.watch(
            queue=lambda: 0 if self._queue is None else len(self._queue),
            tasks=lambda: len(self.tasks),
            resident=lambda: sum(name in self.tasks for name in bank.resident_tasks),
        )

    # --- life ---

    async def start(self) -> None:
        """Begins to answer, in the event loop that is running."""
        settings = self.settings
        self._tokenizing = TokenizingThread()
        self._changing = ThreadPoolExecutor(1, thread_name_prefix="bitfit-tasks")
        self._queue = BatchingQueue(
            self._run,
            max_batch_tokens=settings.max_batch_tokens,
            max_batch_requests=settings.max_batch_requests,
            max_batch_tasks=settings.max_tasks,
            max_wait=settings.max_wait_ms / 1000,
        )
        self._queue.start()
        self.running = True

    async def stop(self) -> None:
        """Answers what has been accepted, and ends."""
        self.running = False
        assert self._queue is not None
        await self._queue.stop()
        assert self._tokenizing is not None
        assert self._changing is not None
        self._tokenizing.close()
        self._changing.shutdown()

    # --- answers ---

    async def predict(
        self, name: str | None, texts: Sequence[Text], *, truncate: bool | None = None, raw_scores: bool = False
    ) -> list[Any]:
        """The predictions of a task for texts, each as [`TaskBank.predict`] gives it.

        Args:
            name (`str`, *optional*): The task; by default the one that there is.
            texts (`Sequence`): Texts or pairs.
            truncate (`bool`, *optional*): Whether to cut texts that are too long; by default as in the settings.
            raw_scores (`bool`): Logits in place of probabilities.

        Raises:
            [`Problem`]: They cannot be answered.
        """
        task = self._info(name)
        if task.type == FEATURE_EXTRACTION.tag:
            raise Problem(424, f"The task {task.name!r} has no head that predicts; POST /embed.", problems.BACKEND)

        if raw_scores and task.type != SEQUENCE_CLASSIFICATION.tag:
            raise problems.invalid(f"`raw_scores` is for text classification, and {task.name!r} is a {task.type}.")

        def finish(text: EncodedText, values: dict[str, Any]) -> Any:
            prediction: Any = text.prediction(values, raw_scores=raw_scores)
            for one in prediction if isinstance(prediction, list) else [prediction]:
                if not all(map(math.isfinite, [one["score"], *one.get("scores", {}).values()])):
                    raise ArithmeticError(f"The task {task.name!r} gave a score that is not finite.")
            return prediction

        with self._slot():
            answers = await self._answers(task.name, texts, truncate, finish)
        return answers

    async def embed(
        self, name: str | None, texts: Sequence[Text], *, truncate: bool | None = None, normalize: bool = True
    ) -> list[list[float]]:
        """An embedding for each text, by the base model, or by a task without a head.

        Args:
            name (`str`, *optional*), texts (`Sequence`), truncate (`bool`, *optional*): As above.
            normalize (`bool`): To length 1.

        Raises:
            [`Problem`]: They cannot be answered.
        """
        if name is not None and self._info(name).type != FEATURE_EXTRACTION.tag:
            raise Problem(424, f"The task {name!r} predicts; POST /predict.", problems.BACKEND)

        def finish(text: EncodedText, values: dict[str, Any]) -> list[float]:
            return embedding(values, pooling=self.pooling, normalize=normalize)

        with self._slot():
            return await self._answers(name, texts, truncate, finish)

    def _info(self, name: str | None) -> TaskDescription:
        name = name or self.settings.default_task
        if name is None:
            infos = self.tasks.infos()
            if len(infos) != 1:
                raise problems.invalid('Name the task: `{"inputs": …, "task": …}`; GET /tasks lists them.')
            return infos[0]
        found = self.tasks.info(name)
        if found is None:
            raise problems.unknown_task(name)
        return found

    @contextmanager
    def _slot(self) -> Iterator[None]:
        """A place for a request; it is free again when the request has been answered, or given up."""
        if not self.running:
            raise Problem(503, "The server is ending.", problems.UNHEALTHY, retry_after=1)
        if self._under_way >= self.settings.max_concurrent_requests:
            raise Problem(429, "The server is overloaded.", problems.OVERLOADED, retry_after=1)
        self._under_way += 1
        self.accepted += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self.answered += 1

    async def _answers(
        self,
        name: str | None,
        texts: Sequence[Text],
        truncate: bool | None,
        finish: Callable[[EncodedText, dict[str, Any]], Any],
    ) -> list[Any]:
        assert self._tokenizing is not None
        assert self._queue is not None
        cut = self.settings.auto_truncate if truncate is None else truncate

        def encode() -> list[Job]:
            start = time.perf_counter()
            try:
                return [Job(self.bank.encode(text, name, truncate=cut), finish) for text in texts]
            finally:
                self.metrics.tokenization.observe(time.perf_counter() - start)

        self._queue.coming += len(texts)
        try:
            jobs = await self._tokenizing(encode)
        except UnknownTaskError as error:
            raise problems.of_running(error, name) from error
        except TaskBankError as error:
            raise problems.of_encoding(error) from error
        finally:
            self._queue.coming -= len(texts)
        try:
            return await self._queue.answers(jobs)
        except Exception as error:
            raise problems.of_running(error, name) from error

    def _run(self, batch: list[Job]) -> list[Any]:
        """Runs a batch, in the thread for it. A text that fails spoils no other's answer."""
        start = time.perf_counter()
        for job in batch:
            self.metrics.queue_seconds.observe(start - job.arrived)
        self.metrics.batch_size.observe(len(batch))
        self.metrics.batch_tokens.observe(sum(job.text.length for job in batch))
        self.metrics.batch_tasks.observe(len({job.text.task.name for job in batch}))
        try:
            outcomes = [
                _finished(job, values) for job, values in zip(batch, self.bank.run([job.text for job in batch]))
            ]
        except Exception as error:  # of whatever kind: each text is tried alone, and keeps the error that is its own
            if not isinstance(error, UnknownTaskError):  # that a task was replaced meanwhile is no failure
                problems.logged(error, f"A batch of {len(batch)} texts failed, so they run one by one")
            outcomes = [self._run_alone(job) for job in batch]
        self.metrics.inference.observe(time.perf_counter() - start)
        return outcomes

    def _run_alone(self, job: Job) -> Any:
        while True:
            try:
                (values,) = self.bank.run([job.text])
                return _finished(job, values)
            except UnknownTaskError:
                # Its task was replaced while it waited, so the text is for the one that has the name now. That may be
                # replaced again before the text has run.
                try:
                    job.text = self.bank.encode(job.text.text, job.text.task.name)  # type: ignore[arg-type]
                except BitFitError as error:  # its task was removed, or takes no such texts
                    return error
            except Exception as error:
                return error

    # --- tasks ---

    async def add_task(self, name: str, source: str, revision: str | None) -> tuple[TaskDescription, bool]:
        """Adds a task from a source that is allowed, or puts it in the place of that of its name.

        Returns:
            `tuple[TaskDescription, bool]`: The task, and whether it is a new name.

        Raises:
            [`Problem`]: It cannot be added; all is as it was.
        """
        allowed = self.sources.check(source, revision)
        return await self._add(name, allowed.place, allowed.revision)

    async def _add(self, name: str, place: str, revision: str | None) -> tuple[TaskDescription, bool]:
        assert self._changing is not None
        new = name not in self.tasks
        try:
            added = await _in(self._changing, lambda: self.tasks.add(name, place, revision=revision))
        except BitFitError as error:
            raise problems.of_adding(error, name) from error
        return added, new

    async def remove_task(self, name: str) -> None:
        """Removes a task.

        Raises:
            [`Problem`]: There is none.
        """
        assert self._changing is not None
        try:
            await _in(self._changing, lambda: self.tasks.remove(name))
        except UnknownTaskError as error:
            raise problems.unknown_task(name) from error


async def _in(threads: ThreadPoolExecutor, call: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(threads, call)


def _finished(job: Job, values: dict[str, Any]) -> Any:
    try:
        return job.finish(job.text, values)
    except Exception as error:
        return error
