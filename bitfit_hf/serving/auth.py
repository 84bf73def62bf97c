"""Who may ask for what. It stands before everything else, so that nothing of a stranger's request is read."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from .problems import FORBIDDEN, UNAUTHORIZED, Problem

# They hold nothing of this server: a health check, the pages and the description of the interface.
OPEN = frozenset({"/", "/docs", "/openapi.json", "/health"})
_CHANGING = frozenset({"PUT", "DELETE", "PATCH"})


class Auth:
    """ASGI middleware that asks for the API key, and for the admin token where tasks change.

    The rule goes by the method, not by the route: whatever changes the server is a PUT or DELETE.

    Args:
        app: The application behind it.
        api_key (`str`, *optional*), admin_token (`str`, *optional*): See [`Settings`].
    """

    def __init__(self, app: Any, *, api_key: str | None, admin_token: str | None) -> None:
        self.app = app
        self._api_key = _digest(api_key)
        self._admin_token = _digest(admin_token)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            problem = self.problem(scope["method"], path, dict(scope["headers"]).get(b"authorization"))
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def problem(self, method: str, path: str, header: bytes | None) -> Problem | None:
        """Why a request is refused, if it is."""
        scheme, _, given = (header or b"").partition(b" ")
        token = given.strip() if scheme.lower() == b"bearer" else None
        admin = _matches(token, self._admin_token)
        if method in _CHANGING:
            if self._admin_token is None:
                return Problem(403, "Tasks cannot be changed here: the server has no admin token.", FORBIDDEN)
            if admin:
                return None
            if _matches(token, self._api_key):
                return Problem(403, "Changing tasks takes the admin token, and this is the API key.", FORBIDDEN)
            return Problem(401, "Changing tasks takes the header `Authorization: Bearer <admin token>`.", UNAUTHORIZED)
        if self._api_key is None or path in OPEN or admin or _matches(token, self._api_key):
            return None
        return Problem(401, "This takes the header `Authorization: Bearer <API key>`.", UNAUTHORIZED)


def _digest(token: str | bytes | None) -> bytes | None:
    data = token.encode() if isinstance(token, str) else token
    return None if data is None else hashlib.sha256(data).digest()


def _matches(token: bytes | None, digest: bytes | None) -> bool:
    # Digests are of one length, so the comparison takes as long for every token.
    given = _digest(token)
    return given is not None and digest is not None and hmac.compare_digest(given, digest)
