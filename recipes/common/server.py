"""`bitfit serve` as a process of its own, for recipes that are its clients."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START_LINE = re.compile(r"^Serving \d+ tasks on \S+ at (http://\S+?)(?::\s|$)")


@dataclass(frozen=True)
class Running:
    """A server that runs.

    Args:
        url (`str`): Where it answers.
        pid (`int`): Its process.
    """

    url: str
    pid: int

    def memory(self) -> int | None:
        """Bytes of it that are in memory, where the system tells that in the way of Linux."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, IndexError, ValueError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")

    def processor_seconds(self) -> float | None:
        """Seconds of a processor that it has taken, likewise."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def bitfit_serve(
    base: str, tasks: Mapping[str, Path], *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A server on a free port, until the block ends.

    Args:
        base (`str`): Its base.
        tasks (`Mapping[str, Path]`): Folders of deltas, by the names of their tasks.
        options (`str`): More options.
        environment (`Mapping[str, str]`, *optional*): More variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, source in tasks.items():
            (Path(folder) / name).symlink_to(source.resolve())
        command = [sys.executable, "-m", "bitfit_hf.cli", "serve", base, "--tasks-dir", folder, "--port", "0"]
        with running([*command, *options], environment) as server:
            yield server


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Running]:
    """A process that says `Serving … at URL` when it is ready, until the block ends; it is then told to end."""
    process = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=None, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            found = _START_LINE.match(line)
            if found:
                yield Running(found[1], process.pid)
                break
        else:
            raise SystemExit(f"The server has ended with {process.wait()} before it was ready.")
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
