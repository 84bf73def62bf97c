"""[`TokenizingThread`]: the tokenizer, off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

_Waiting: TypeAlias = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class TokenizingThread:
    """
    One thread that tokenizes.

    It takes all that waits at once and hands back all of it at once: to tokenize a short text takes less than to wake
    a thread and to be woken by it, as an executor would for each text.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._wake = threading.Condition()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="bitfit-tokenizing", daemon=True)
        self._thread.start()

    def __call__(self, encode: Callable[[], Any]) -> asyncio.Future[Any]:
        """What `encode` returns or raises; called in the thread."""
        future: asyncio.Future[Any] = self._loop.create_future()
        with self._wake:
            self._waiting.append((encode, future))
            if len(self._waiting) == 1:
                self._wake.notify()
        return future

    def close(self) -> None:
        """Ends the thread, when it has done what is waiting."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                waiting, self._waiting = self._waiting, []
            if not waiting:
                return
            done: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
            for encode, future in waiting:
                if future.cancelled():  # who asked has gone
                    continue
                try:
                    done.append((future, encode(), None))
                except Exception as error:
                    done.append((future, None, error))
            self._loop.call_soon_threadsafe(_hand_back, done)


def _hand_back(done: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, result, error in done:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
