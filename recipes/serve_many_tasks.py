"""Serves many tasks on one base model: the two quickstart tasks, a hundred copies of them, and a mixed stream.

The tasks are read from the quickstart's folder, and trained first (minutes) if they are not there. Then some clients
send texts, each for a random task, and a batching queue answers them from one `TaskBank`. At the end every answer is
compared with that of the task's own model.

    python recipes/serve_many_tasks.py
    python recipes/serve_many_tasks.py --copies 500 --requests 4000 --clients 64
    python recipes/serve_many_tasks.py --task_dir outputs/quickstart --task rte sst2 --model bert-base-uncased

Behind a web framework
----------------------
One process, one bank, one queue. The bank is made when the process starts; the request handlers, in whatever threads
or coroutines the framework runs them, hand their text to the queue and wait for its future:

    app = FastAPI()
    queue = BatchingQueue(bank)

    @app.post("/{task}")
    async def answer(task: str, text: str):
        if task not in bank:
            raise HTTPException(404, f"no task {task}")
        return await asyncio.wrap_future(queue.ask(text, task))

The queue collects what arrives within a few milliseconds, whichever tasks it is for, and runs it as one batch: this is
what keeps the processor busy when each task alone gets a request now and then. `bank.add_task` and `bank.remove_task`
may be called at any time, from an admin endpoint for example. More processes than one are worth it only on several
devices, since each has its own copy of the base. With more tasks than memory, `TaskBank(..., max_tasks=N)` keeps the N
that were used last and reads the others when they are asked for.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import quickstart
import synthetic_data
import torch
import transformers
from rich.console import Console
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from bitfit_hf import TaskBank


@dataclass
class Arguments:
    task: list[str] = field(
        default_factory=lambda: list(quickstart.GENERATED_ROWS), metadata={"help": "Tasks of the quickstart."}
    )
    task_dir: str = field(default="outputs/quickstart", metadata={"help": "Folder with a delta for each."})
    model: str | None = field(default=None, metadata={"help": "Their base. Default: the quickstart's MiniLM."})
    copies: int = field(default=50, metadata={"help": "Further names under which each task is added."})
    requests: int = field(default=600, metadata={"help": "Texts in the stream."})
    clients: int = field(default=16, metadata={"help": "Threads that send them, each one at a time."})
    batch_size: int = field(default=32, metadata={"help": "Largest batch of the queue."})
    wait_ms: float = field(default=5.0, metadata={"help": "How long the queue waits for a batch to fill."})
    seed: int = 0


class BatchingQueue:
    """Collects single requests from many threads into batches for a bank.

    Args:
        bank ([`TaskBank`]): With a tokenizer.
        batch_size (`int`, *optional*, defaults to 32): Largest batch.
        wait (`float`, *optional*, defaults to 0.005): Seconds that the first request of a batch waits for others.
    """

    def __init__(self, bank: TaskBank, *, batch_size: int = 32, wait: float = 0.005) -> None:
        self.bank = bank
        self.batch_size = batch_size
        self.wait = wait
        self.sizes: Counter[int] = Counter()
        self._requests: queue.SimpleQueue[tuple[str, str | None, Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, text: str, task: str | None) -> Future[Any]:
        """Hands in a text; the future becomes the bank's answer to it."""
        future: Future[Any] = Future()
        self._requests.put((text, task, future))
        return future

    def close(self) -> None:
        """Answers what has been handed in, and stops."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._requests.get()) is not None:
            batch, closing = [first], False
            deadline = time.monotonic() + self.wait
            while len(batch) < self.batch_size and not closing:
                try:
                    request = self._requests.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if request is None:
                    closing = True
                else:
                    batch.append(request)
            self._answer(batch)
            if closing:
                return

    def _answer(self, batch: list[tuple[str, str | None, Future[Any]]]) -> None:
        texts, tasks, futures = zip(*batch, strict=True)
        try:
            answers = self.bank.predict(texts, tasks, batch_size=self.batch_size)
        except Exception as error:  # to whom it belongs, the caller
            if len(batch) == 1:
                futures[0].set_exception(error)
            else:  # a task that was removed a moment ago must not spoil the others' answers
                for request in batch:
                    self._answer([request])
            return
        self.sizes[len(batch)] += 1
        for future, answer in zip(futures, answers, strict=True):
            future.set_result(answer)


def delta_folders(args: Arguments) -> dict[str, Path]:
    """The tasks' deltas, trained now where they are missing."""
    folders = {task: Path(args.task_dir) / task for task in args.task}
    missing = [task for task, folder in folders.items() if not (folder / "adapter_config.json").is_file()]
    if missing:
        options = ["--model_name_or_path", args.model] if args.model else []
        quickstart.main(["--task", *missing, "--output_dir", args.task_dir, *options])
    return folders


def texts_for(task: str, size: int, seed: int) -> list[str]:
    """Texts that suit the task, where it is a generated one."""
    name = task if task in quickstart.GENERATED_ROWS else "intent"
    return [row["text"] for row in synthetic_data.generate(name, "eval", size, seed)]


def check(args: Arguments, base: str, folders: dict[str, Path], stream: list[tuple[str, str]], answers: Any) -> float:
    """The largest difference of an answer's scores from those of the task's own model."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    largest = 0.0
    for task, folder in folders.items():
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        for (text, name), answer in zip(stream, answers, strict=True):
            if name.partition("-")[0] == task:
                with torch.no_grad():
                    logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0]
                scores = logits if len(logits) == 1 else logits.softmax(-1)
                given = torch.tensor(list(answer["scores"].values()))
                largest = max(largest, (scores - given).abs().max().item())
    return largest


def main(argv: list[str] | None = None) -> float:
    (args,) = HfArgumentParser(Arguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    folders = delta_folders(args)
    base = args.model or quickstart.demo_model()

    bank = TaskBank(AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    for task, folder in folders.items():
        bank.add_task(task, folder)
        for number in range(args.copies):
            bank.add_task(f"{task}-{number}", folder)
    memory = bank.memory()
    console.print(
        f"{len(bank)} tasks in {memory['tasks'] / 1e6:.1f} MB beside a base of {memory['base'] / 1e6:.0f} MB."
    )

    rng = random.Random(args.seed)
    pools = {task: texts_for(task, 100, args.seed) for task in folders}
    names = rng.choices(bank.tasks, k=args.requests)
    stream = [(rng.choice(pools[name.partition("-")[0]]), name) for name in names]

    requests = BatchingQueue(bank, batch_size=args.batch_size, wait=args.wait_ms / 1000)
    start = time.perf_counter()
    with ThreadPoolExecutor(args.clients) as clients:
        answers = list(clients.map(lambda request: requests.ask(*request).result(), stream))
    seconds = time.perf_counter() - start
    requests.close()

    for (text, name), answer in list(zip(stream, answers, strict=True))[:5]:
        console.print(f"[bold]{name:>12}[/]  {answer['label']} ({answer['score']:.2f})  [dim]{text}[/]")
    batches = sum(requests.sizes.values())
    console.print(
        f"{len(stream)} requests for {len(set(names))} tasks in {seconds:.1f} s ({len(stream) / seconds:.0f} per "
        f"second), in {batches} batches of {len(stream) / batches:.1f} on average."
    )
    difference = check(args, base, folders, stream, answers)
    console.print(f"Every answer is that of its task's own model, to {difference:.0e}.")
    return difference


if __name__ == "__main__":
    main()
