"""Load for an HTTP server: requests that arrive as a Poisson process, or clients that each wait for their answer.

The client is a few lines of HTTP/1.1 over asyncio, since it runs on the cores of the server that is measured: what a
request costs here is taken from there. `Outcome.generator_seconds` says how much that was.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from urllib.parse import urlsplit

# Called with the number of a request and the JSON of its answer; returns whether it is the right one.
Check = Callable[[int, Any], bool]


class Client:
    """Sends JSON to a server and keeps its connections.

    Args:
        url (`str`): Of the server, `http://host:port`.
        headers (`Mapping[str, str]`, *optional*): Sent with each request.
    """

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise SystemExit(f"--url is http://host:port, got {url!r}.")
        self.host, self.port = parts.hostname, parts.port or 80
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._head = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n{more}Content-Length: "
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of an answer.

        Raises:
            `OSError`: The server does not answer.
        """
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        reader, writer = await self._connection()
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\n{self._head}{len(data)}\r\n\r\n".encode() + data)
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").lower().split("\r\n")
            if "transfer-encoding: chunked" in lines:
                answer = await _chunks(reader)
            else:
                length = next((int(line[15:]) for line in lines if line.startswith("content-length:")), 0)
                answer = await reader.readexactly(length)
        except asyncio.IncompleteReadError as error:
            writer.close()
            raise ConnectionError("The server has closed the connection before its answer.") from error
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        return int(head[9:12]), answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()  # the server has closed what nobody used for a while
        return await asyncio.open_connection(self.host, self.port)

    async def close(self) -> None:
        """Closes all connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """A body in chunks, each behind its size, to the one of size zero."""
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass
    return b"".join(parts)


@dataclass
class Outcome:
    """What became of some requests.

    Args:
        seconds (`float`): From the first to the last answer.
        latencies (`list[float]`): Seconds of each request that was answered, from when it was due.
        statuses (`dict[int, int]`): How often each status came; 0: no answer.
        wrong (`list[int]`): Numbers of the requests whose answer was not the right one.
        late (`float`): Seconds by which 99 of 100 requests were sent at most after they were due.
        generator_seconds (`float`): Of a processor, that this took.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    wrong: list[int] = field(default_factory=list)
    late: float = 0.0
    generator_seconds: float = 0.0

    @property
    def throughput(self) -> float:
        """Answers in a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def quantile(self, share: float) -> float:
        """The seconds within which this share of the requests was answered."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")

    def figures(self) -> dict[str, Any]:
        """For a record."""
        return {
            "answered": len(self.latencies),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "wrong": len(self.wrong),
            "seconds": self.seconds,
            "throughput": self.throughput,
            "mean": statistics.mean(self.latencies) if self.latencies else float("nan"),
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "late_p99": self.late,
            "generator_seconds_per_request": self.generator_seconds / max(1, sum(self.statuses.values())),
        }


def arrivals(rate: float, count: int, rng: random.Random) -> Iterator[float]:
    """When requests are due: `count` times, in seconds, with `rate` of them in a second on average."""
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        yield now


Clients: TypeAlias = Client | Sequence[Client]


async def open_loop(
    client: Clients, path: str, bodies: Sequence[bytes], *, rate: float, seed: int = 0, check: Check | None = None
) -> Outcome:
    """Sends each request when it is due, whether others have been answered or not.

    Args:
        client ([`Client`] or `Sequence[Client]`), path (`str`): Where to; a client for all requests, or one for each.
        bodies (`Sequence[bytes]`): The JSON of each request.
        rate (`float`): Requests in a second, on average.
        seed (`int`): Of the arrivals.
        check (`Callable`, *optional*): Looks at each answer.
    """
    outcome, lags = Outcome(), []
    processor, start = time.process_time(), time.perf_counter()
    tasks = []
    for number, due in enumerate(arrivals(rate, len(bodies), random.Random(seed))):
        while (left := start + due - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        lags.append(time.perf_counter() - start - due)
        tasks.append(asyncio.create_task(_one(client, path, bodies, number, start + due, outcome, check)))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    outcome.seconds = time.perf_counter() - start
    outcome.late = sorted(lags)[int(0.99 * (len(lags) - 1))]
    outcome.generator_seconds = time.process_time() - processor
    return outcome


async def closed_loop(
    client: Clients, path: str, bodies: Sequence[bytes], *, clients: int, check: Check | None = None
) -> Outcome:
    """Sends with so many clients, each of which waits for its answer before it sends again: as much as there can be.

    Args:
        client ([`Client`] or `Sequence[Client]`), path (`str`), bodies (`Sequence[bytes]`), check (`Callable`,
            *optional*): As above.
        clients (`int`): Requests under way at a time.
    """
    outcome, numbers = Outcome(), iter(range(len(bodies)))
    processor, start = time.process_time(), time.perf_counter()

    async def one_client() -> None:
        for number in numbers:
            await _one(client, path, bodies, number, time.perf_counter(), outcome, check)

    await asyncio.gather(*(one_client() for _ in range(clients)))
    outcome.seconds = time.perf_counter() - start
    outcome.generator_seconds = time.process_time() - processor
    return outcome


async def _one(
    client: Clients, path: str, bodies: Sequence[bytes], number: int, due: float, outcome: Outcome, check: Check | None
) -> None:
    one = client if isinstance(client, Client) else client[number]
    try:
        status, answer = await one.request("POST", path, bodies[number])
    except OSError:
        status, answer = 0, b""
    outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
    if status == 200:
        outcome.latencies.append(time.perf_counter() - due)
        if check is not None and not check(number, json.loads(answer)):
            outcome.wrong.append(number)
