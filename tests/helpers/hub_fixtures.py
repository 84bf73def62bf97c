"""Fixtures that point the real client, `transformers` and `peft` at a `LoopbackHub`.

`hub` is a fresh server with the users alice (who is logged in where `hub_env` is used) and bob; `hub_env` redirects
this process to it and gives the environment for subprocesses:

```python
def test_push(hub, hub_env):
    model.push_to_hub("alice/tiny")                      # in this process
    subprocess.run(command, env=hub_env.environ, check=True)
    assert set(hub.files("alice/tiny")) == {...}
```
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import LoopbackHub
from huggingface_hub import close_session, constants, file_download, hf_api
from huggingface_hub.utils import _http
from transformers.utils import hub as transformers_hub

_SETTINGS = {
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # With hf_xet installed the client would upload large files to Xet storage only; this makes it use git LFS.
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_OFFLINE": "0",
    "TRANSFORMERS_OFFLINE": "0",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
_UNSET = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH", "HF_TOKEN")
_UNSET += ("HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_CO_STAGING", "HF_ENDPOINT", "HF_HOME")


@dataclass
class HubEnv:
    """
    A redirected client, see `hub_client_env`.

    Attributes:
        home (`Path`): Takes the place of `HF_HOME`; empty at the start.
        waits (`list[float]`): Seconds that the client would have waited before trying again, had it been let.
    """

    hub: LoopbackHub
    home: Path
    monkeypatch: pytest.MonkeyPatch
    waits: list[float] = field(default_factory=list)

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    @property
    def environ(self) -> dict[str, str]:
        """The environment in which a subprocess uses the same hub, the same cache and the same token."""
        return dict(os.environ)

    def login(self, user: str | None) -> None:
        """Sends this user's token from now on, or none."""
        if user is None:
            self.monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            self.monkeypatch.setenv("HF_TOKEN", self.hub.users[user].token)

    def go_offline(self) -> None:
        """As with `HF_HUB_OFFLINE=1`, here and in subprocesses: only the cache is left."""
        self.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        self.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@contextmanager
def hub_client_env(hub: LoopbackHub, home: Path) -> Iterator[HubEnv]:
    """
    Redirects this process's client to `hub`, with `home` for its cache and token, and puts everything back at the end.

    The client reads its environment when it is imported, so besides the environment (for subprocesses, and for what is
    read late, such as `HF_TOKEN`) this replaces the constants and the endpoint kept in ready-made API objects.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        env = HubEnv(hub, home, monkeypatch)
        _redirect(env)
        try:
            yield env
        finally:
            close_session()


def _redirect(env: HubEnv) -> None:
    hub, home, monkeypatch = env.hub, env.home, env.monkeypatch
    for name in _UNSET:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**_SETTINGS, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)

    old_home = constants.HF_HOME
    for name, value in list(vars(constants).items()):
        if isinstance(value, str) and value.startswith(old_home):
            monkeypatch.setattr(constants, name, str(home) + value[len(old_home) :])
    replaced = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(env.cache),
        "HUGGINGFACE_HUB_CACHE": str(env.cache),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # behind `huggingface_hub.create_repo` and the like
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # made anew, and forgotten afterwards

    # Only the two modules that wait between attempts get a clock that does not wait.
    clock = SimpleNamespace(**{**vars(time), "sleep": env.waits.append})
    monkeypatch.setattr(file_download, "time", clock)
    monkeypatch.setattr(_http, "time", clock)

    def factory() -> Any:
        client = _http.default_client_factory()
        client.event_hooks["request"].append(partial(_stay_on_loopback, hub))
        return client

    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", factory)
    close_session()  # forget a client made earlier


def _stay_on_loopback(hub: LoopbackHub, request: Any) -> None:
    """Where a release of the client has the Hub's address written in its code, the request comes here nevertheless;
    one to anywhere else is a mistake."""
    if request.url.host == "huggingface.co":
        url = hub.endpoint + request.url.raw_path.decode()
        request.url = type(request.url)(url)
        request.headers["Host"] = request.url.netloc.decode()
    elif request.url.host != "127.0.0.1":
        raise AssertionError(f"A test asked for {request.url}, which is not on this machine")


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.create_user("alice")
        server.create_user("bob")
        yield server


@pytest.fixture
def hub_env(hub: LoopbackHub, tmp_path: Path) -> Iterator[HubEnv]:
    with hub_client_env(hub, tmp_path / "hf_home") as env:
        env.login("alice")
        yield env
