"""A Hub on the loopback interface, for tests: the real `huggingface_hub` client runs against it unmodified.

```python
with LoopbackHub() as hub:
    hub.create_user("alice", token="hf_alice")
    hub.put("alice/tiny", {"config.json": b"{}"}, message="first")
    HfApi(endpoint=hub.endpoint, token="hf_alice").list_repo_files("alice/tiny")
    hub.files("alice/tiny")                                  # what a repository holds, byte for byte
    hub.fail_next(503, method="HEAD", path=r"config\\.json")  # faults: see `LoopbackHub`
    hub.requests                                             # everything that was asked for
```

Two servers run on 127.0.0.1: the Hub itself, and the "CDN" that large files are uploaded to and downloaded from. As on
the real Hub these are different origins, so a client that leaks its token to the second one is noticed (status 400).
Transfers are git LFS over HTTP; Xet storage is not offered (see `hub_fixtures.py` for how clients are told).
Only model repositories exist. Data lives in memory, in `hub_store.py`.
"""

from __future__ import annotations

import http.server
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

import hub_api
import hub_files
from hub_http import Request, Response
from hub_store import Blob, Commit, HubError, Repo, User, is_large


@dataclass
class _Fault:
    """Something that happens to the next `times` requests that match, instead of or before the regular answer."""

    method: str | None
    path: str
    times: int
    route: str | None = None
    error: HubError | None = None
    callback: Callable[[], object] | None = None
    cut_after: int | None = None  # bytes of the body that still arrive; -1: not even the status line

    def matches(self, request: Request) -> bool:
        if self.times < 1 or (self.route is not None and self.route != request.route):
            return False
        return self.method in (None, request.method) and re.search(self.path, request.path) is not None


class LoopbackHub:
    """
    A Hugging Face Hub of one's own, as a context manager.

    Args:
        lfs_threshold (`int`, *optional*, defaults to 10 MB): Larger files go to LFS whatever their name.

    Attributes:
        requests (`list[Request]`): Every request since the start, in order of arrival.
        downloads (`Counter`): How often the content of `(repo_id, path)` was sent, whole or in part.
    """

    def __init__(self, *, lfs_threshold: int = 10_000_000):
        self.lfs_threshold = lfs_threshold
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.downloads: Counter[tuple[str, str]] = Counter()
        self._faults: list[_Fault] = []
        self.corrupted: dict[str, bytes] = {}
        self._crashes: list[Exception] = []
        self._lock = threading.RLock()
        self._servers = [_Server(self), _Server(self)]
        self.endpoint, self.cdn_endpoint = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        if self._crashes:
            raise self._crashes[0]

    # What a test prepares and asserts

    def create_user(
        self, name: str, token: str | None = None, *, orgs: tuple[str, ...] = (), read_only: bool = False
    ) -> User:
        self.users[name] = User(name, token or f"hf_{name}", orgs, read_only)
        return self.users[name]

    def create_repo(
        self,
        repo_id: str,
        *,
        private: bool = False,
        gated: Literal[False, "auto", "manual"] = False,
        user: str | None = None,
    ) -> Repo:
        with self._lock:
            if repo_id in self.repos:
                raise HubError(409, f"You already created the model repo {repo_id}")
            self.repos[repo_id] = Repo(repo_id, user or repo_id.split("/")[0], private, gated)
            return self.repos[repo_id]

    def put(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        *,
        message: str = "update",
        user: str | None = None,
        revision: str = "main",
    ) -> str:
        """Commits files (`None` deletes one) and creates the repository where needed. Returns the commit's id."""
        with self._lock:
            repo = self.repos.get(repo_id) or self.create_repo(repo_id, user=user)
            changes: dict[str, Blob | None] = {}
            for path, data in files.items():
                changes[path] = None if data is None else Blob(data, self.is_large(repo, path, len(data), data))
                if data is not None and changes[path].lfs:
                    repo.lfs_objects[changes[path].sha256] = data
            return repo.commit(changes, author=user or repo.owner, title=message, revision=revision).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The complete content of a repository, `.gitattributes` included."""
        return self.repos[repo_id].resolve(revision).files

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The history of a branch, newest first; the last is the "initial commit" that the Hub itself makes."""
        return self.repos[repo_id].log(revision)

    def count(self, method: str | None = None, path: str = "") -> int:
        """How many requests so far had this method and a path that the regular expression finds."""
        probe = _Fault(method, path, times=1)
        return sum(probe.matches(request) for request in self.requests)

    # Faults

    def fail_next(
        self,
        status: int,
        *,
        method: str | None = None,
        path: str = "",
        times: int = 1,
        message: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """The next `times` requests with this method and path (a regular expression) fail with `status`."""
        extra = {"Retry-After": "0"} if status == 429 else {}
        error = HubError(status, message or f"injected status {status}", code, {**extra, **(headers or {})})
        self._faults.append(_Fault(method, path, times, error=error))

    def cut_connection_after(self, n_bytes: int, path: str = "", *, method: str = "GET", times: int = 1) -> None:
        """The next matching answers break off after `n_bytes` of their body; -1: the request is carried out, but the
        connection closes without any answer."""
        self._faults.append(_Fault(method, path, times, cut_after=n_bytes))

    def before_next(self, route: str, callback: Callable[[], object], *, path: str = "") -> None:
        """Calls `callback` when the next request for `route` has arrived, before it is carried out.

        `hub.before_next("commit", lambda: hub.put("alice/tiny", {...}, user="bob"))` is a concurrent commit between
        the moment the client looked at the repository and its own commit.
        """
        self._faults.append(_Fault(None, path, 1, route=route, callback=callback))

    def corrupt(self, repo_id: str, path: str, data: bytes | None = None, *, revision: str = "main") -> None:
        """Downloads of this content give `data` instead (default: one byte flipped), under the unchanged id."""
        blob = self.repos[repo_id].blob(revision, path)[1]
        middle = len(blob.data) // 2
        flipped = blob.data[:middle] + bytes([blob.data[middle] ^ 0xFF]) + blob.data[middle + 1 :]
        self.corrupted[blob.etag] = flipped if data is None else data

    def clear_faults(self) -> None:
        """Forgets all faults and corruptions that are still to come."""
        with self._lock:
            self._faults.clear()
            self.corrupted.clear()

    # Carrying out a request

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> tuple[Response, int | None]:
        """The response to a request, and after how many bytes of it the connection breaks off (`None`: never)."""
        request = Request(method, unquote(target), headers, body)
        path = urlsplit(target).path
        endpoint, arguments = hub_api.route.find(method, path) or hub_files.route.find(method, path) or (None, {})
        request.route = getattr(endpoint, "__name__", "")
        faults = self._log(request)
        try:
            for fault in faults:
                if fault.callback is not None:
                    fault.callback()  # without the lock: it may use the Hub, in another thread too
                if fault.error is not None:
                    raise fault.error
            if endpoint is None:
                raise HubError(404, f"LoopbackHub has no endpoint for {method} {request.path}")
            with self._lock:
                request.user = self._authenticate(headers)
                response = endpoint(self, request, **arguments)
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            response = Response.from_json({"error": error.message}, error.status, **code, **error.headers)
            response.headers["X-Error-Message"] = error.message.replace("\n", " ")
        except Exception as error:  # a mistake in a callback or in this double: reported when the hub closes
            self._crashes.append(error)
            response = Response.from_json({"error": f"LoopbackHub crashed: {error!r}"}, 500)
        request.status = response.status
        return response, next((fault.cut_after for fault in faults if fault.cut_after is not None), None)

    def _log(self, request: Request) -> list[_Fault]:
        """Records a request and takes what is planned for it: all callbacks, and the first fault."""
        with self._lock:
            self.requests.append(request)
            matching = [fault for fault in self._faults if fault.matches(request)]
            callbacks = [fault for fault in matching if fault.callback is not None]
            others = [fault for fault in matching if fault.callback is None]
            for fault in (taken := callbacks + others[:1]):
                fault.times -= 1
        return taken

    def _authenticate(self, headers: Mapping[str, str]) -> User | None:
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        user = next((user for user in self.users.values() if user.token == token), None)
        if token and user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def is_large(self, repo: Repo, path: str, size: int, sample: bytes, revision: str = "main") -> bool:
        """Whether a new file is to be stored with git LFS."""
        gitattributes = repo.resolve(revision).files.get(".gitattributes", b"")
        return is_large(path, size, sample[:512], gitattributes, self.lfs_threshold)


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self, hub: LoopbackHub):
        super().__init__(("127.0.0.1", 0), _HttpHandler)
        self.hub = hub

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news; everything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _HttpHandler(http.server.BaseHTTPRequestHandler):
    """Reads one request, lets the hub answer it, and writes the answer, perhaps not all of it."""

    server: _Server
    protocol_version = "HTTP/1.1"  # the client keeps its connections open
    wbufsize = -1  # headers and body leave in one piece: no wait for the other side's delayed acknowledgement
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        body = self._read_body()
        response, cut_after = self.server.hub.answer(self.command, self.path, self.headers, body)
        if cut_after == -1:
            return self._disconnect()
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[:cut_after])
        if cut_after is not None:
            self._disconnect()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _disconnect(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: `LoopbackHub.requests` is the log."""
