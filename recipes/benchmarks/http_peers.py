"""The other ways to serve many tasks over HTTP, for `http_serving.py`: each is one process that says where it answers.

    python recipes/benchmarks/http_peers.py merged FOLDER              # a server for one merged model
    python recipes/benchmarks/http_peers.py multiplexed FOLDER [...]   # Ray Serve, `@serve.multiplexed`
    python recipes/benchmarks/http_peers.py ray BASE FOLDER [...]      # Ray Serve, our application, these deltas

`merged` has the queue of our server and a leaner application around it, so what differs is the model. Requests to
`multiplexed` name their model in Ray's own header. Both batch up to 32 texts and wait 2 ms for them.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MOST, WAIT = 32, 0.002  # texts in a batch, seconds


class Model:
    """A stock model that answers texts."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def answers(self, texts: list[str]) -> list[Any]:
        """Labels and scores of each text."""
        import torch

        with torch.no_grad():
            logits = self.model(**self.tokenizer(texts, padding=True, return_tensors="pt")).logits
        labels = self.model.config.id2label
        return [
            [{"label": labels[index], "score": score} for index, score in enumerate(row)]
            for row in logits.softmax(-1).tolist()
        ]


@dataclass
class Text:
    """What the queue looks at."""

    text: str
    length: int = 1
    runs_with: tuple[str, int] = ("right", 0)
    task: Any = field(default_factory=lambda: SimpleNamespace(name=None))


def merged(folder: str) -> None:
    """Serves one model with uvicorn."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from bitfit_hf.serving.queue import BatchingQueue, Job
    from bitfit_hf.serving.run import listen

    model = Model(folder)
    queue: list[BatchingQueue] = []

    @asynccontextmanager
    async def lifespan(_: Any) -> Any:
        def run(batch: list[Job]) -> list[Any]:
            return model.answers([job.text.text for job in batch])

        queue.append(BatchingQueue(run, max_batch_tokens=10**9, max_batch_requests=MOST, max_wait=WAIT))
        queue[0].start()
        yield
        await queue[0].stop()

    async def predict(request: Request) -> JSONResponse:
        text = json.loads(await request.body())["inputs"]
        (answer,) = await queue[0].answers([Job(Text(text), lambda *_: None)])  # type: ignore[arg-type]
        return JSONResponse(answer)

    app = Starlette(routes=[Route("/predict", predict, methods=["POST"])], lifespan=lifespan)
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, log_level="warning", access_log=False, backlog=2048)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            say(listening.getsockname()[1])

    Server(config).run(sockets=[listening])


def on_ray(application: Any) -> None:
    """Runs an application on a Ray of its own until the process is told to end."""
    import ray
    from ray import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    ray.init(include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application, name="bench", logging_config={"enable_access_log": False})
        ended = threading.Event()
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, lambda *_: ended.set())
        say(port)
        while not ended.wait(0.5):
            pass
    finally:
        serve.shutdown()
        ray.shutdown()


def multiplexed(folders: list[str]) -> Any:
    """One replica that holds all models, as Ray Serve's documentation has it."""
    from ray import serve

    @serve.deployment(name="Multiplexed", max_ongoing_requests=512, ray_actor_options={"num_cpus": 1})
    class Multiplexed:
        @serve.multiplexed(max_num_models_per_replica=len(folders))
        async def model(self, name: str) -> Model:
            return Model(folders[int(name)])

        @serve.batch(max_batch_size=MOST, batch_wait_timeout_s=WAIT)
        async def answers(self, texts: list[str]) -> list[Any]:
            model = await self.model(serve.get_multiplexed_model_id())  # Ray makes batches of one model each
            return await asyncio.to_thread(model.answers, texts)

        async def __call__(self, request: Any) -> Any:
            return await self.answers((await request.json())["inputs"])

    return Multiplexed.bind()


def ours(base: str, folders: list[str]) -> Any:
    """Our application with one replica."""
    from bitfit_hf.serving.ray import application

    return application({"base": base, "tasks": {Path(folder).name: folder for folder in folders}})


def say(port: int) -> None:
    """The line that `common.server.running` waits for."""
    print(f"Serving 1 tasks on peer at http://127.0.0.1:{port}", flush=True)


def main(argv: list[str]) -> None:
    kind, *rest = argv
    if kind == "merged" and len(rest) == 1:
        merged(rest[0])
    elif kind in ("multiplexed", "ray") and len(rest) > (kind == "ray"):
        on_ray(multiplexed(rest) if kind == "multiplexed" else ours(rest[0], rest[1:]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
