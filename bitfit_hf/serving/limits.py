"""What is refused before it is parsed: bodies that are too large, too slow, too deep, or no JSON in UTF-8."""

from __future__ import annotations

import re
from typing import Any

import anyio

from .problems import Problem, invalid, logged

MAX_DEPTH = 16  # the deepest request there is has three levels
BODY_SECONDS = 30.0
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
# A string, in which brackets mean nothing, or a bracket.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


class Limits:
    """ASGI middleware that reads the body of a request and checks it, and hides what goes wrong inside.

    Args:
        app: The application behind it.
        max_body_bytes (`int`): Bytes in a body.
    """

    def __init__(self, app: Any, *, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def sending(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["method"] in _WITH_BODY:
                body = await self._body(scope, receive)
                if body is None:  # the client has left
                    return
                receive = _replaying(body, receive)
            await self.app(scope, receive, sending)
        except Problem as problem:
            await problem.response()(scope, receive, sending)
        except Exception as error:
            number = logged(error, "A request failed")
            if started:
                raise
            failed = Problem(500, f"The server failed (number {number} in the log).", "Backend")
            await failed.response()(scope, receive, sending)

    async def _body(self, scope: Any, receive: Any) -> bytes | None:
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise invalid("The body has to be JSON, with the header `Content-Type: application/json`.", 415)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body_bytes:
            raise self._too_large()
        try:
            # Not `asyncio.wait_for`: before Python 3.12 it loses a cancellation that comes together with the body.
            with anyio.fail_after(BODY_SECONDS):
                body = await self._read(receive)
        except TimeoutError:
            raise invalid("The body did not arrive in time.", 408) from None
        if body is not None:
            _check(body)
        return body

    async def _read(self, receive: Any) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> Problem:
        return invalid(f"The body is larger than {self.max_body_bytes} bytes.", 413)


def _check(body: bytes) -> None:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        raise invalid("The body is not UTF-8.") from None
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token.group(), 0)
        if depth > MAX_DEPTH:
            raise invalid(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _replaying(body: bytes, receive: Any) -> Any:
    """Gives the body that was read, and then what else comes: that the client has left."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
