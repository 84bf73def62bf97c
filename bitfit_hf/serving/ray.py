"""The server on Ray Serve: as many replicas as wanted, on as many machines, which share their tasks.

[`application`] is what `serve run` and `serve deploy` take:

    serve run recipes/deploy/ray_serve.yaml

The task is an argument of a request and no model id, so Ray Serve sends a request to whichever replica has least to
do, and each replica puts the texts of all tasks together. Replicas, autoscaling and resources are Ray's own settings,
for the deployment `BitFit`. A second deployment, `Tasks`, holds the [`TaskLog`](shared.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import MissingDependencyError, ServingError, collect

try:
    from ray import serve
except ImportError as error:
    raise MissingDependencyError(
        f'Serving on Ray needs the extra `ray` ({error}): `pip install "bitfit-hf[ray]"`.'
    ) from error

from .app import create_app
from .settings import Settings
from .shared import Entry, Failure, SharedEngine, TaskLog
from .start import first_tasks, load_bank, load_pooling, settle

# What Ray Serve has settings of its own for.
_OF_RAY = ("host", "port")
# What is no part of a file that is shown on a dashboard.
_SECRET = ("admin_token", "api_key")


def application(args: Mapping[str, Any]) -> serve.Application:
    """The application, as Ray Serve takes it.

    Args:
        args (`Mapping[str, Any]`):
            The fields of [`Settings`], but for `host` and `port`. `admin_token` and `api_key` are taken from
            `BITFIT_SERVE_ADMIN_TOKEN` and `BITFIT_SERVE_API_KEY` where they are not given. `tasks_dir` and folders of
            tasks have to be there under the same path on every machine.

    Raises:
        [`ServingError`]: The settings cannot be.
    """
    settings = settings_of(args)
    first = first_tasks(settings)

    def build() -> Any:
        # In the replica. What it closes over is all that is sent there.
        engine = SharedEngine(
            load_bank(settings), settings, first=first, log=_RemoteLog, pooling=load_pooling(settings)
        )
        settle()
        return create_app(engine)

    @serve.ingress(build)
    class BitFit:
        def __init__(self, tasks: Any) -> None:
            pass  # so that the log is a part of the application; `_RemoteLog` finds it

    log: Any = serve.deployment(
        name="Tasks",
        num_replicas=1,
        max_ongoing_requests=10_000,  # each replica of `BitFit` always waits here for news
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )(TaskLog)
    server: Any = serve.deployment(
        name="BitFit",
        # Ray Serve's default is 5, which would be the largest batch. What is over this waits with Ray.
        max_ongoing_requests=settings.max_concurrent_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )(BitFit)
    return server.bind(log.bind(first))


def settings_of(args: Mapping[str, Any]) -> Settings:
    """The settings in a configuration file of Ray Serve.

    Raises:
        [`ServingError`]: They cannot be.
    """
    known = {field.name for field in fields(Settings)} - set(_OF_RAY)
    problems = [f"{name!r} is none of {', '.join(sorted(known))}" for name in args if name not in known]
    if "base" not in args:
        problems.append("'base' is missing: the folder or Hub repo of the base model")
    if problems:
        raise ServingError(f"The application cannot start with these args:{collect(problems)}")
    values = {name: os.environ.get(f"BITFIT_SERVE_{name.upper()}") for name in _SECRET} | dict(args)
    values["allow_source"] = tuple(values.get("allow_source") or ())
    return Settings(**values)


class _RemoteLog:
    """The [`TaskLog`] of the application that the replica belongs to."""

    def __init__(self) -> None:
        context = serve.get_replica_context()
        self._log = serve.get_deployment_handle("Tasks", app_name=context.app_name)

    async def follow(
        self, generation: str, server: str, applied: int, failures: dict[int, Failure]
    ) -> tuple[int, dict[str, Entry]]:
        return await self._log.follow.remote(generation, server, applied, failures)

    async def alive(self, server: str) -> None:
        await self._log.alive.remote(server)

    async def leave(self, server: str) -> None:
        await self._log.leave.remote(server)

    async def change(
        self, server: str, name: str, place: str | None, revision: str | None
    ) -> tuple[int, Entry | None]:
        return await self._log.change.remote(server, name, place, revision)

    async def settled(self, version: int) -> Failure | None:
        return await self._log.settled.remote(version)

    async def withdraw(self, name: str, version: int, before: Entry | None) -> None:
        await self._log.withdraw.remote(name, version, before)

    async def restore(self, generation: str, version: int, entries: dict[str, Entry]) -> None:
        await self._log.restore.remote(generation, version, entries)
