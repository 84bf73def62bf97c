"""The server on a local Ray: two replicas that share their tasks, started by `serve run` with the recipes' file."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving_tester import ADMIN, ANSWERING, Expected, close, text_for

pytest.importorskip("ray.serve")

from bitfit_hf.errors import ServingError
from bitfit_hf.serving.ray import settings_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "recipes" / "deploy" / "ray_serve.yaml"
pytestmark = pytest.mark.ray


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except httpx.TransportError:
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def running(folder: Path, title: bytes = b"") -> list[int]:
    """The processes of the Ray that was started with this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (path / "environ").read_bytes() and (path / "cmdline").read_bytes().startswith(
                title
            ):
                found.append(int(path.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture(scope="module")
def place(world: Path) -> Iterator[tuple[str, Path]]:
    """Ray Serve with the file of the recipes: another base and tasks, two replicas, a port that is free."""
    config = yaml.safe_load(CONFIG.read_text())
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    application["args"] |= {
        "base": str(world / "base"),
        "tasks": {name: str(world / "tasks" / name) for name in ANSWERING if name != "tags"},
        "allow_source": [str(world / "tasks")],
    }
    del deployment["autoscaling_config"]
    deployment["num_replicas"] = 2
    port = config["http_options"]["port"] = free_port()
    # Short: sockets are made in it, and their paths may not be long.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray ends what does not answer in seconds, which on a machine that does other things too is too short.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "90",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "90",
        "BITFIT_SERVE_ADMIN_TOKEN": "admin",
    }
    environment.pop("RAY_ADDRESS", None)
    with open(folder / "output", "w+") as output:
        command = [sys.executable, "-m", "ray.serve.scripts", "run", str(folder / "serve.yaml")]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=world)
        try:
            url = f"http://127.0.0.1:{port}"

            def up() -> bool:
                assert process.poll() is None, (folder / "output").read_text()[-4000:]
                return len(replicas(url)) == 2

            until(up, 400, "two replicas are up")
            yield url, folder
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            output.seek(0)
            print(output.read()[-20_000:])  # for whoever looks for what went wrong
            deadline = time.monotonic() + 20
            while running(folder) and time.monotonic() < deadline:
                time.sleep(0.2)
            left = running(folder)
            for one in left:
                os.kill(one, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)
    assert left == []


def replicas(url: str) -> set[str]:
    """Which replicas answer: each counts for itself, and says in its metrics when it was made."""
    found = set()
    with httpx.Client(base_url=url, timeout=30) as client:
        for _ in range(30):
            response = client.get("/metrics")
            if response.status_code != 200:
                return set()
            found |= set(re.findall(r"^bitfit_start_time_seconds (\S+)$", response.text, flags=re.MULTILINE))
    return found


def ask(url: str, expected: Expected, names: list[str], count: int) -> None:
    def one(number: int) -> None:
        name = names[number % len(names)]
        text = text_for(name, number)
        response = client.post("/predict", json={"inputs": text, "task": name})
        assert response.status_code == 200, response.text
        assert close(response.json(), expected(name, text)), (name, text, response.json())

    for number in range(count):
        name = names[number % len(names)]
        expected(name, text_for(name, number))
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(count)))


def test_the_file_of_the_recipes_is_one_for_serve_run():
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(CONFIG.read_text())
    assert config["applications"][0]["deployments"][0]["autoscaling_config"]["min_replicas"] == 2
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    settings = settings_of(application["args"])
    assert settings.base == "sentence-transformers/all-MiniLM-L6-v2"
    assert settings.allow_source == ("./outputs",)


def test_args_that_cannot_be(monkeypatch):
    monkeypatch.setenv("BITFIT_SERVE_API_KEY", "the-key")
    with pytest.raises(ServingError, match=r"(?s)'port' is none of .*'base' is missing"):
        settings_of({"port": 1})
    with pytest.raises(ServingError, match="max_batch_tokens"):
        settings_of({"base": "x", "max_batch_tokens": 0})
    assert settings_of({"base": "x"}).api_key == "the-key"
    assert settings_of({"base": "x", "api_key": "another"}).api_key == "another"


def test_two_replicas_share_their_tasks_and_a_new_one_gets_them(place, expected):
    address, folder = place
    first = [name for name in ANSWERING if name != "tags"]
    ask(address, expected, first, 200)
    before = replicas(address)
    assert len(before) == 2
    with httpx.Client(base_url=address, headers=ADMIN, timeout=60) as admin:
        assert admin.put("/tasks/tags", json={"source": "tags"}).status_code == 201
        ask(address, expected, ["tags"], 60)
        ask(address, expected, ANSWERING, 200)
        assert admin.put("/tasks/tags", json={"source": "nowhere"}).status_code == 403
        assert httpx.put(f"{address}/tasks/x", json={"source": "tags"}, timeout=30).status_code == 401
        assert admin.delete("/tasks/rating").status_code == 204
        gone = [admin.post("/predict", json={"inputs": "a", "task": "rating"}).status_code for _ in range(40)]
        assert gone == [404] * 40

        # By accident: nobody is told.
        os.kill(running(folder, b"ray::ServeReplica:bitfit:BitFit")[0], signal.SIGKILL)

        def renewed() -> bool:
            now = replicas(address)
            return len(now) == 2 and len(now & before) == 1

        until(renewed, 180, "a new replica is up")
        ask(address, expected, [name for name in ANSWERING if name != "rating"], 200)
        listed = [tuple(sorted(row["name"] for row in admin.get("/tasks").json())) for _ in range(40)]
        assert set(listed) == {tuple(sorted(name for name in ANSWERING if name != "rating"))}
