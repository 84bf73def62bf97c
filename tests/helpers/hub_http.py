"""Requests, responses, and the tables of endpoints that `hub_api.py` and `hub_files.py` fill.

An endpoint is a function of the hub, the request and the named parts of its path. It returns a `Response` or raises a
`HubError`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import HubError, Repo, User

if TYPE_CHECKING:
    from hub_server import LoopbackHub


@dataclass
class Request:
    """One request, as logged in `LoopbackHub.requests`.

    Attributes:
        path (`str`): Decoded path with the query string, what the `path` of a fault is matched against.
        route (`str`): Name of the function that answered: `"commit"`, `"preupload"`, `"resolve"`, … (`""`: none).
        user (`User`, *optional*): Whose token was sent.
        status (`int`): The answer; 0 while there is none.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    route: str = ""
    user: User | None = None
    status: int = 0

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)


@dataclass
class Response:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any, status: int = 200, **headers: str) -> Response:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


Endpoint = Callable[..., Response]


class Router:
    """Endpoints by method and path."""

    def __init__(self) -> None:
        self._routes: list[tuple[str, re.Pattern[str], Endpoint]] = []

    def __call__(self, methods: str, template: str) -> Callable[[Endpoint], Endpoint]:
        """Registers an endpoint for `"GET|HEAD"`: `{repo_id}` is two parts of the path, `{path}` the rest of it, any
        other name one part."""
        pattern = template.replace(".", r"\.").replace("{repo_id}", "(?P<repo_id>[^/]+/[^/]+)")
        pattern = pattern.replace("{path}", "(?P<path>.+)")
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)

        def register(endpoint: Endpoint) -> Endpoint:
            self._routes.extend((method, re.compile(pattern), endpoint) for method in methods.split("|"))
            return endpoint

        return register

    def find(self, method: str, path: str) -> tuple[Endpoint, dict[str, str]] | None:
        """The endpoint for a path that is still percent-encoded (a revision may contain `%2F`), and its arguments."""
        for route_method, pattern, endpoint in self._routes:
            match = pattern.fullmatch(path)
            if match and method == route_method:
                return endpoint, {name: unquote(value) for name, value in match.groupdict().items()}
        return None


def find_repo(hub: LoopbackHub, request: Request, repo_id: str, *, write: bool = False, content: bool = False) -> Repo:
    """The repository, if it exists and the user may see it, `write` to it, read the `content` of its files."""
    repo, user = hub.repos.get(repo_id), request.user
    owns = repo is not None and user is not None and repo.namespace in (user.name, *user.orgs)
    if repo is None or (repo.private and not owns):
        # The Hub does not tell whether a private repository exists. To somebody unknown it says 401; the client
        # takes that for "repository not found" by itself only at an https endpoint, hence the code.
        status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
        raise HubError(status, message, "RepoNotFound")
    if content and repo.gated and not owns and (user is None or user.name not in repo.granted):
        message = f"Access to model {repo_id} is restricted. You must have access to it and be authenticated."
        raise HubError(403 if user else 401, message, "GatedRepo")
    if write:
        require_writer(request, repo.namespace)
    return repo


def require_user(request: Request) -> User:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    return request.user


def require_writer(request: Request, namespace: str) -> User:
    user = require_user(request)
    if not user.may_write(namespace):
        raise HubError(403, f"You don't have the rights to write to the namespace {namespace!r}")
    return user
