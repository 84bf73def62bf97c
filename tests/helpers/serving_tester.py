"""What the tests of the server share: a tiny base with tasks of every kind, and a server that runs in this process."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from bank_tester import bert_base, random_delta, tokenizer

from bitfit_hf import TaskBank
from bitfit_hf.serving import Engine, Settings, create_app
from bitfit_hf.serving.run import listen, serve

KINDS = {
    "sentiment": "sequence-3",
    "topics": "multi-4",
    "rating": "regression",
    "tags": "token-4",
    "spans": "question",
    "vectors": "backbone",
    "entails": "sequence-2",
}
ANSWERING = [name for name in KINDS if name != "vectors"]
WORDS = "abcdefgh"
ADMIN = {"Authorization": "Bearer admin"}  # the token of the tests' servers


def save_world(folder: Path) -> Path:
    """A base in `base/`, and a delta for each task in `tasks/`."""
    base = bert_base()
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    for seed, (name, kind) in enumerate(KINDS.items()):
        random_delta(base, kind, seed=seed).save_pretrained(folder / "tasks" / name)
    return folder


def make_engine(world: Path, tasks: Any = KINDS, **values: Any) -> Engine:
    """An engine with these tasks, as `load_engine` makes it, but on a base that need not be read."""
    settings = Settings(base=str(world / "base"), **values)
    engine = Engine(TaskBank(bert_base(), tokenizer(), max_tasks=settings.max_tasks), settings)
    for name in tasks:
        engine.tasks.add(name, str(world / "tasks" / name))
    return engine


@asynccontextmanager
async def client_of(engine: Engine, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, without a network."""
    app = create_app(engine)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60, **options) as client:
            yield client


@contextmanager
def served(engine: Engine) -> Iterator[str]:
    """The address of a real server, which runs in a thread until the block ends."""
    import uvicorn

    listening = listen("127.0.0.1", 0)
    up = threading.Event()
    servers: list[Any] = []
    original = uvicorn.Server.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        servers.append(self)

    uvicorn.Server.__init__ = remember  # type: ignore[method-assign]
    thread = threading.Thread(target=serve, args=(engine, listening), kwargs={"ready": up.set}, daemon=True)
    try:
        thread.start()
        assert up.wait(30)
    finally:
        uvicorn.Server.__init__ = original  # type: ignore[method-assign]
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        servers[0].should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def text_for(name: str, number: int) -> Any:
    """The text of a request: of its own length, and a question where the task takes one."""
    length = 1 + number % 9
    words = " ".join(WORDS[(number + i) % 8] for i in range(length))
    if KINDS[name] == "question":
        return [" ".join(WORDS[: 1 + number % 3]), words]
    return [words, "a b"] if number % 5 == 4 else words


def as_served(prediction: Any) -> Any:
    """What the server makes of a prediction of the bank."""
    if isinstance(prediction, dict) and "scores" in prediction:
        rows = [{"score": score, "label": label} for label, score in prediction["scores"].items()]
        return sorted(rows, key=lambda row: -row["score"])
    return prediction


def close(one: Any, other: Any, tolerance: float = 1e-5) -> bool:
    """Equal up to rounding. Labels of equal scores may stand in either order."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    return one == other


class Expected:
    """The bank's own answers, computed alone, one at a time."""

    def __init__(self, world: Path) -> None:
        self.bank = TaskBank(bert_base(), tokenizer())
        for name in ANSWERING:
            self.bank.add_task(name, world / "tasks" / name)
        self._known: dict[tuple[str, str], Any] = {}

    def __call__(self, name: str, text: Any) -> Any:
        key = (name, repr(text))
        if key not in self._known:
            pair = tuple(text) if isinstance(text, list) else text
            with torch.no_grad():
                self._known[key] = as_served(self.bank.predict([pair], [name])[0])
        return self._known[key]
