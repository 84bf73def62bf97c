"""[`create_app`]: the HTTP interface of an [`Engine`], for any ASGI server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from .. import __version__
from . import problems
from .auth import Auth
from .direct import Direct, sentence
from .engine import Engine
from .info import info_of
from .limits import Limits
from .metrics import CONTENT_TYPE
from .page import DOCS, PAGE, Page
from .problems import Problem
from .schemas import (
    AddTaskRequest,
    EmbedRequest,
    EmbedResponse,
    ErrorResponse,
    Info,
    PredictRequest,
    PredictResponse,
    TaskDescription,
    TaskSummary,
    read_inputs,
    read_strings,
)

Result = TypeVar("Result")

_WORDS = {
    401: "The key is missing or wrong.",
    403: "Not allowed.",
    404: "There is no such task.",
    413: "Too many texts, or too long ones.",
    415: "The body is no JSON.",
    422: "The request is not as it has to be.",
    424: "The model could not answer.",
    429: "The server is overloaded; see the header Retry-After.",
    503: "The server is ending.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse, "description": _WORDS[status]} for status in statuses}


_ANSWERING = _errors(401, 404, 413, 415, 422, 424, 429, 503)


def create_app(engine: Engine) -> FastAPI:
    """The application. It starts and stops the engine with itself (ASGI's lifespan).

    Args:
        engine ([`Engine`]): With its tasks. It belongs to the application from now on.

    Returns:
        `FastAPI`: For uvicorn, or whatever else runs ASGI applications.
    """
    settings, metrics = engine.settings, engine.metrics

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop()

    app = FastAPI(
        title="bitfit serve",
        description="Many BitFit tasks on one base model, in the wire format of Text Embeddings Inference.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads its script from elsewhere
        redoc_url=None,
    )
    handlers: dict[str, Any] = {}  # filled below
    app.add_middleware(Direct, handlers=handlers)
    app.add_middleware(Limits, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(Auth, api_key=settings.api_key, admin_token=settings.admin_token)

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problems.invalid(sentence(error.errors())).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return Problem(404, "There is no such address; /docs lists them.", problems.NOT_FOUND).response()
        if error.status_code == 405:
            response = problems.invalid(f"{request.method} is not possible here.", 405).response()
            response.headers.update(error.headers or {})
            return response
        # What FastAPI says of a body that it could not read at all.
        return problems.invalid("The body cannot be read as JSON.").response()

    async def answered(request: Request, method: str, size: int, work: Awaitable[Result]) -> Result:
        """Waits for an answer as long as the client does, and counts."""
        start = time.perf_counter()
        metrics.requests.labels(method).inc()
        try:
            result = await _while_connected(request, work)
        except Problem as error:
            metrics.failures.labels(method, str(error.status)).inc()
            raise
        except asyncio.CancelledError:
            metrics.failures.labels(method, str(problems.CLIENT_LEFT)).inc()
            raise
        metrics.successes.labels(method).inc()
        metrics.duration.labels(method).observe(time.perf_counter() - start)
        (metrics.predict_success if method == "predict" else metrics.embed_success).inc(size)
        return result

    limits = {"most": settings.max_client_batch_size, "longest": settings.max_input_chars}

    @app.post("/predict", response_model=PredictResponse, responses=_ANSWERING, tags=["Answers"])
    async def predict(request: Request, body: PredictRequest) -> Response:
        """Predictions of a task.

        Text classification: the labels with their scores, the highest first. Token classification and question
        answering: as transformers' pipelines. A batch is answered with a list of these.
        """
        texts, batch = read_inputs(body.inputs, **limits)
        metrics.predict_count.inc(len(texts))
        work = engine.predict(body.task, texts, truncate=body.truncate, raw_scores=body.raw_scores)
        answers = [_prediction(answer) for answer in await answered(request, "predict", len(texts), work)]
        return JSONResponse(answers if batch else answers[0])

    @app.post("/embed", response_model=EmbedResponse, responses=_ANSWERING, tags=["Answers"])
    async def embed(request: Request, body: EmbedRequest) -> Response:
        """Embeddings by the base model, one for each text."""
        texts = read_strings(body.inputs, **limits)
        metrics.embed_count.inc(len(texts))
        work = engine.embed(body.task, texts, truncate=body.truncate, normalize=body.normalize)
        return JSONResponse(await answered(request, "embed", len(texts), work))

    handlers.update({"/predict": (PredictRequest, predict), "/embed": (EmbedRequest, embed)})

    @app.get("/tasks", response_model=list[TaskSummary], responses=_errors(401), tags=["Tasks"])
    async def list_tasks() -> Response:
        """The tasks."""
        rows = [
            {"name": info.name, "type": info.type, "labels": None if info.id2label is None else len(info.id2label)}
            for info in engine.tasks.infos()
        ]
        return JSONResponse(rows)

    @app.get("/tasks/{name}", response_model=TaskDescription, responses=_errors(401, 404), tags=["Tasks"])
    async def describe_task(name: str) -> Response:
        """A task: its labels, the metrics on its card, its size."""
        info = engine.tasks.info(name)
        if info is None:
            raise problems.unknown_task(name)
        return JSONResponse(info.model_dump())

    @app.put(
        "/tasks/{name}",
        response_model=TaskDescription,
        responses={201: {"model": TaskDescription}, **_errors(401, 403, 415, 422)},
        tags=["Tasks"],
    )
    async def put_task(name: str, body: AddTaskRequest) -> Response:
        """Adds a task, or replaces it in one step. Takes the admin token, and a source that the server allows."""
        info, new = await engine.add_task(name, body.source, body.revision)
        return JSONResponse(info.model_dump(), 201 if new else 200)

    @app.delete("/tasks/{name}", status_code=204, responses=_errors(401, 403, 404), tags=["Tasks"])
    async def delete_task(name: str) -> Response:
        """Removes a task. Takes the admin token."""
        await engine.remove_task(name)
        return Response(status_code=204)

    @app.get("/info", response_model=Info, responses=_errors(401), tags=["Server"])
    async def info() -> Response:
        """The model and the limits."""
        return JSONResponse(info_of(engine))

    @app.get("/health", responses=_errors(503), tags=["Server"])
    async def health() -> Response:
        """200 while the server answers."""
        if not engine.running:
            raise Problem(503, "The server is ending.", problems.UNHEALTHY)
        return Response()

    @app.get("/metrics", responses=_errors(401), tags=["Server"])
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    for path, page in (("/", PAGE), ("/docs", DOCS)):
        app.add_api_route(path, _showing(page), include_in_schema=False)
    return app


def _showing(page: Page) -> Any:
    async def show() -> Response:
        return HTMLResponse(page.html, headers=page.headers)

    return show


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Waits for `work`; it is given up when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        leaving.cancel()
        working.cancel()
    raise Problem(problems.CLIENT_LEFT, "The client has left.", problems.VALIDATION)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _prediction(answer: Any) -> Any:
    if isinstance(answer, dict) and "scores" in answer:
        rows = [{"score": score, "label": label} for label, score in answer["scores"].items()]
        return sorted(rows, key=lambda row: -row["score"])
    return answer
