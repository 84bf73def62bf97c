"""Where tasks may come from while the server runs: what the operator has allowed, and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import ServingError
from .problems import FORBIDDEN, Problem

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_PATTERN = re.compile(r"[\w.*?-]+(/[\w.*?-]+)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,127}", re.ASCII)
_LONGEST = 512


@dataclass(frozen=True)
class Source:
    """A source that is allowed.

    Args:
        place (`str`): The folder, with all links resolved, or the repo.
        revision (`str`, *optional*): Of the repo.
    """

    place: str
    revision: str | None = None


class AllowedSources:
    """The sources that `--allow-source` names.

    A folder is written as a path (`/srv/deltas`, `./deltas`), and stands for all folders in it; clients name these
    relative to it, or by their whole path. Anything else is a pattern of Hub repos, in which a star does not match a
    slash.

    Args:
        allowed (`Iterable[str]`): Folders and patterns.

    Raises:
        [`ServingError`]: A folder does not exist, or a pattern can be none.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._folders: list[Path] = []
        self._patterns: list[re.Pattern[str]] = []
        for entry in allowed:
            if entry.startswith((".", "~", os.sep)) or Path(entry).is_dir():
                folder = Path(entry).expanduser()
                if not folder.is_dir():
                    raise ServingError(f"--allow-source {entry}: there is no such folder.")
                self._folders.append(folder.resolve())
            elif _PATTERN.fullmatch(entry):
                wild = {"*": "[^/]*", "?": "[^/]"}
                self._patterns.append(re.compile("".join(wild.get(char) or re.escape(char) for char in entry)))
            else:
                raise ServingError(
                    f"--allow-source {entry!r} is neither a folder (`./deltas`) nor a pattern of Hub repos (`user/*`)."
                )

    def check(self, source: str, revision: str | None = None) -> Source:
        """The source that a client has named.

        One answer for all that is not allowed, so that nobody finds out what there is beside.

        Raises:
            [`Problem`]: It is not allowed.
        """
        found = self._repo(source, revision) if _REPO.fullmatch(source) else None
        found = found or (self._folder(source) if revision is None else None)
        if found is None:
            raise Problem(403, "This source is not among those that the server allows.", FORBIDDEN)
        return found

    def _repo(self, source: str, revision: str | None) -> Source | None:
        if not any(pattern.fullmatch(source) for pattern in self._patterns):
            return None
        if ".." in source or (revision is not None and (".." in revision or not _REVISION.fullmatch(revision))):
            return None
        # A folder of that name would be read in place of the repo.
        return None if os.path.lexists(source) else Source(source, revision)

    def _folder(self, source: str) -> Source | None:
        path = PurePosixPath(source)
        if len(source) > _LONGEST or not source.isprintable() or "\\" in source or "://" in source:
            return None
        if not path.parts or ".." in path.parts or source.startswith("~"):
            return None
        for root in self._folders:
            try:
                real = (root / path).resolve(strict=True)
                files = [entry.resolve() for entry in real.iterdir()] if real.is_dir() else []
            except (OSError, RuntimeError):  # not there, not to be read, or links in a circle
                continue
            if real != root and files and all(place.is_relative_to(root) for place in (real, *files)):
                return Source(str(real))
        return None
