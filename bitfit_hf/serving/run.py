"""Runs the application with uvicorn, until the process is told to end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from ..errors import MissingDependencyError, ServingError
from .app import create_app
from .engine import Engine


def listen(host: str, port: int) -> socket.socket:
    """The socket to serve on, so that an address that is taken is an error before anything is said.

    Raises:
        [`ServingError`]: The address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ServingError(f"The server cannot listen on {host}, port {port}: {error.strerror or error}.") from error
    return listening


def serve(engine: Engine, listening: socket.socket, *, ready: Callable[[], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then answers what has been accepted and returns.

    Args:
        engine ([`Engine`]): With its tasks.
        listening (`socket.socket`): Where.
        ready (`Callable`, *optional*): Called once requests are answered.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingDependencyError(
            f'`bitfit serve` needs the extra `serve` ({error}): `pip install "bitfit-hf[serve]"`.'
        ) from error

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started and ready is not None:
                ready()

    config = uvicorn.Config(
        create_app(engine),
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=2048,
        # Longer than the minute after which most proxies let go of a connection: whoever closes it should be the side
        # that sends. uvicorn's 5 s end in a request now and then that meets a closed connection.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=engine.settings.drain_seconds,
    )
    # uvicorn raises the signal that ended it once more when all is done; by then it has been obeyed.
    caught = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {one: signal.signal(one, lambda *_: None) for one in caught}
    try:
        Server(config).run(sockets=[listening])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
