"""The runs that have been done: one JSON file each, written in one step, and a claim on each run under way.

A file holds the run's `spec` (what was asked for), the recipe's own record (what came out, with versions, commit and
hardware) and, of a BitFit run, the rows of the bias change: so no weights need to be kept. No path of the machine is
stored. A file that is there is a finished run: a run that was killed half-way has none, and is done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bitfit_hf.analysis import BiasChange, BiasChangeRow
from bitfit_hf.storage.files import write_bytes

from .plan import Run
from .studies import SCORES

FORMAT = 1


class DamagedRunError(ValueError):
    """The file of a run is no longer what was written."""


@dataclass
class StoredRun:
    """
    A finished run.

    Args:
        id (`str`): The run's, which is also the file's name.
        spec (`dict[str, Any]`): What was asked for, see [`Run.spec`].
        record (`dict[str, Any]`): The recipe's `run.json`, a [`common.record.RunRecord`].
        wall_seconds (`float`): Of the whole run, with loading and evaluations: what a further one will take.
        bias_change (`list[dict[str, Any]]`): Rows of [`bitfit_hf.bias_change`]; empty for other methods than BitFit.
    """

    id: str
    spec: dict[str, Any]
    record: dict[str, Any]
    wall_seconds: float
    bias_change: list[dict[str, Any]] = field(default_factory=list)

    def changes(self) -> BiasChange:
        """The rows as [`bitfit_hf.plot_bias_change`] takes them."""
        return BiasChange(BiasChangeRow(**row) for row in self.bias_change)

    def to_json(self) -> bytes:
        """The file's content."""
        values = {"format": FORMAT, **asdict(self)}
        rows = values.pop("bias_change")
        others = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False).removeprefix("{\n")
        # A line for each row of the figure: they are most of a file, and differ as a whole.
        lines = ",\n".join(f"  {json.dumps(row, sort_keys=True, ensure_ascii=False)}" for row in rows)
        figure = f"[\n{lines}\n ]" if rows else "[]"
        return f'{{\n "bias_change": {figure},\n{others}\n'.encode()

    @classmethod
    def from_json(cls, data: bytes, run_id: str) -> StoredRun:
        """Reads a file's content.

        Raises:
            `ValueError`: It is no JSON, of another format or another run, or lacks what tables are made of.
        """
        values = json.loads(data)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"no run of format {FORMAT}")
        if values.get("id") != run_id:
            raise ValueError(f"it holds the run {values.get('id')!r}")
        record = values.get("record")
        if not isinstance(record, dict) or not isinstance(values.get("spec"), dict):
            raise ValueError("`spec` and `record` must be objects")
        for name, kind in (("history", list), ("metrics", dict), ("trainable", dict), ("bytes", int)):
            if not isinstance(record.get(name), kind):
                raise ValueError(f"`record.{name}` is missing or of the wrong type")
        if not all(isinstance(record["metrics"].get(name), dict) for name in SCORES):
            raise ValueError(f"`record.metrics` must hold {' and '.join(SCORES)}")
        stored = cls(run_id, values["spec"], record, float(values["wall_seconds"]), values.get("bias_change", []))
        stored.changes()
        return stored


class RunStore:
    """
    A folder of finished runs, which several processes and machines may share.

    Args:
        folder (`str` or `Path`): Runs are in `<folder>/runs`; `<folder>/.work` holds what is under way, and git
            ignores it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.runs = self.folder / "runs"
        self.work = self.folder / ".work"
        self._read: dict[str, tuple[int, StoredRun]] = {}

    def path(self, run: Run | str) -> Path:
        """The file of a run."""
        return self.runs / f"{run if isinstance(run, str) else run.id}.json"

    def has(self, run: Run) -> bool:
        """Whether a run is finished."""
        return self.path(run).exists()

    def get(self, run: Run) -> StoredRun | None:
        """A finished run; `None` where it is not.

        Raises:
            [`DamagedRunError`]: The file is there but is not what was written.
        """
        path = self.path(run)
        try:
            stamp = path.stat().st_mtime_ns
            known = self._read.get(run.id)
            if known is not None and known[0] == stamp:
                return known[1]
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            stored = StoredRun.from_json(data, run.id)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedRunError(
                f"{path} is damaged: {error}. Restore the file, or pass --repeat_damaged to do the run again."
            ) from error
        self._read[run.id] = (stamp, stored)
        return stored

    def put(
        self, run: Run, record: Mapping[str, Any], wall_seconds: float, bias_change: Iterable[BiasChangeRow] = ()
    ) -> StoredRun:
        """Keeps a finished run; after a crash its file is whole or not there.

        Args:
            run ([`Run`]): What was asked for.
            record (`Mapping[str, Any]`): What came out.
            wall_seconds (`float`): How long it took.
            bias_change (`Iterable[BiasChangeRow]`): Of a BitFit run.
        """
        stored = StoredRun(run.id, run.spec, dict(record), wall_seconds, [asdict(row) for row in bias_change])
        data = stored.to_json()
        StoredRun.from_json(data, run.id)  # what could not be read again is not written
        write_bytes(self.path(run), data)
        return stored

    def damaged(self, runs: Iterable[Run]) -> list[DamagedRunError]:
        """The errors of those files that cannot be read."""
        found = []
        for run in runs:
            try:
                self.get(run)
            except DamagedRunError as error:
                found.append(error)
        return found

    def set_aside_damaged(self, runs: Iterable[Run]) -> list[Path]:
        """Renames the files that cannot be read to `*.damaged`: their runs are missing then. Returns the new names."""
        moved = []
        for run in runs:
            if self.damaged([run]):
                target = self.path(run).with_suffix(".damaged")
                os.replace(self.path(run), target)
                moved.append(target)
        return moved

    @contextlib.contextmanager
    def claim(self, run: Run) -> Iterator[Path | None]:
        """Claims a run for this process while the context lasts, and gives an empty folder to work in.

        The claim is a lock of the operating system: it ends with the process that holds it, however that ends, so
        there are no stale claims to guess about. It holds between machines that share the folder through a file system
        with locks (NFS has them); without, use `--shard`.

        Yields:
            `Path`, *optional*: The folder; `None` if another process has the run or has just finished it.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / ".gitignore").write_text("*\n", encoding="utf-8")
        lock = FileLock(self.work / f"{run.id}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield None
            return
        try:
            if self.has(run):
                yield None
                return
            folder = self.work / run.id
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            lock.release()

    def is_claimed(self, run: Run) -> bool:
        """Whether some process is doing a run right now."""
        path = self.work / f"{run.id}.lock"
        if not path.exists():
            return False
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False
