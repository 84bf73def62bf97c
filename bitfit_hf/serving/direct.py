"""[`Direct`]: the short way to an answer, past the layers of the web framework.

FastAPI's own way to a route takes longer than reading the request, tokenizing its text and writing the answer
together, and all of it on the cores that the model needs. Its routes remain what describes the interface.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from . import problems
from .problems import Problem

Handler: TypeAlias = Callable[[Request, Any], Awaitable[Response]]


class Direct:
    """ASGI middleware that answers POST requests to some paths itself.

    Args:
        app: The application behind it.
        handlers (`Mapping[str, tuple[type[BaseModel], Handler]]`): By path, what the body is and who answers.
    """

    def __init__(self, app: Any, *, handlers: Mapping[str, tuple[type[BaseModel], Handler]]) -> None:
        self.app = app
        self._handlers = handlers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        found = None
        if scope["type"] == "http" and scope["method"] == "POST":
            found = self._handlers.get(scope["path"].removeprefix(scope.get("root_path", "")))
        if found is None:
            await self.app(scope, receive, send)
            return
        model, handler = found
        request = Request(scope, receive)
        try:
            response = await handler(request, model.model_validate_json(await request.body()))
        except ValidationError as error:
            response = problems.invalid(sentence(error.errors())).response()
        except Problem as problem:
            response = problem.response()
        await response(scope, receive, send)


def sentence(errors: Any) -> str:
    """What is wrong with a body, in one sentence, without repeating what was sent.

    Args:
        errors (`Sequence[Mapping[str, Any]]`): As pydantic lists them.
    """
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    no_object = "The body has to be a JSON object."
    kinds: dict[str, str] = {
        "json_invalid": "The body is not valid JSON.",
        "missing": f"`{where}` is missing." if where else "There is no body.",
        "extra_forbidden": f"There is no field `{where:.60}`.",
        "model_type": no_object,
        "model_attributes_type": no_object,
    }
    return kinds.get(first["type"]) or f"`{where:.60}`: {first['msg']}."
