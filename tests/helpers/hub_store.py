"""What a Hub stores: users, repositories, commits and content-addressed files, all in memory.

`hub_server.py` speaks HTTP on top of this; nothing here knows about requests. Object ids are those of git and git LFS,
because the client compares them with its own: a regular file's id is the git blob hash of its content, a large file's
id is the sha256 of its content, and its entry in a tree is the git blob hash of the LFS *pointer*.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Literal

LFS_PATTERNS = (
    *("*.7z", "*.arrow", "*.bin", "*.ckpt", "*.gz", "*.h5", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.parquet"),
    *("*.pickle", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.tar", "*.zip", "*.zst", "*tfevents*"),
)
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


class HubError(Exception):
    """An answer of the Hub that is not a success.

    Args:
        status (`int`): The HTTP status.
        message (`str`): What the client shows the user.
        code (`str`, *optional*): Value of `X-Error-Code`, from which the client picks its exception class.
        headers (`dict`, *optional*): Further headers of the answer.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class User:
    """An account with one token. It may write to its own namespace and to those of its `orgs`."""

    name: str
    token: str
    orgs: tuple[str, ...] = ()
    read_only: bool = False

    def may_write(self, namespace: str) -> bool:
        return not self.read_only and namespace in (self.name, *self.orgs)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """The content of one file and the way it is stored."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}")
        return "".join(f"{line}\n" for line in lines).encode()

    @cached_property
    def git_oid(self) -> str:
        return _git_oid(self.pointer if self.lfs else self.data)

    @property
    def etag(self) -> str:
        """The id by which the client recognises the content: file names in its cache, "unchanged" in an upload."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """One commit: the complete file list after it, and the commit it was made on."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: datetime
    blobs: Mapping[str, Blob]

    @property
    def files(self) -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.blobs.items()}


@dataclass
class Repo:
    """A model repository: refs that point into a history of commits, and large files waiting to be committed.

    Attributes:
        refs (`dict[str, str]`): Commit id per full ref name: `refs/heads/main`, `refs/tags/v1`, `refs/pr/1`.
        lfs_objects (`dict[str, bytes]`): Uploaded large files by sha256, committed or not.
        granted (`set[str]`): Names of the users whom the owner of a gated repository let in.
    """

    id: str
    owner: str
    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    granted: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)
    pull_requests: int = 0

    def __post_init__(self) -> None:
        files = {".gitattributes": Blob(GITATTRIBUTES)}
        self._add_commit("refs/heads/main", None, files, "initial commit", "", "system")

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, full ref or (shortened) commit id names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.history[self.refs[ref]]
        if re.fullmatch(r"[0-9a-f]{5,40}", revision):
            matches = [commit for oid, commit in self.history.items() if oid.startswith(revision)]
            if len(matches) == 1:
                return matches[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def log(self, revision: str = "main") -> list[Commit]:
        """The commits that lead to `revision`, newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.history[commits[-1].parent])
        return commits

    def blob(self, revision: str, path: str) -> tuple[Commit, Blob]:
        commit = self.resolve(revision)
        if path not in commit.blobs:
            # The client caches "this file does not exist at that commit" only if it learns the commit.
            raise HubError(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        return commit, commit.blobs[path]

    def writable_ref(self, revision: str) -> str:
        """The full name of the branch or pull request that a commit to `revision` moves."""
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(
        self,
        changes: Mapping[str, Blob | None],
        *,
        author: str,
        title: str,
        description: str = "",
        revision: str = "main",
        parent: str | None = None,
        create_pr: bool = False,
    ) -> Commit:
        """
        Adds one commit and moves a branch to it, or opens a pull request with it.

        Args:
            changes (`Mapping[str, Blob | None]`): New content per path; `None` deletes the file.
            parent (`str`, *optional*): The commit that the author saw. Another one there by now is error 412.
            create_pr (`bool`, *optional*, defaults to `False`): Commit to a new `refs/pr/N` instead of `revision`.
        """
        head = self.resolve(revision)
        if parent is not None and create_pr:
            head = self.resolve(parent)
        elif parent is not None and not head.oid.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if create_pr:
            self.pull_requests += 1
            ref = f"refs/pr/{self.pull_requests}"
        else:
            ref = self.writable_ref(revision)
        blobs = {**head.blobs, **changes}
        return self._add_commit(ref, head.oid, {p: b for p, b in blobs.items() if b}, title, description, author)

    def create_ref(self, ref: str, target: str) -> None:
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        self.refs[ref] = target

    def _add_commit(
        self, ref: str, parent: str | None, blobs: dict[str, Blob], title: str, description: str, author: str
    ) -> Commit:
        date = datetime.now(timezone.utc)
        tree = sorted((path, blob.git_oid) for path, blob in blobs.items())
        # The number of commits so far keeps two equal commits within one tick of the clock apart.
        identity = json.dumps([tree, parent, title, description, author, date.isoformat(), len(self.history)])
        commit = Commit(
            oid=hashlib.sha1(identity.encode()).hexdigest(),
            parent=parent,
            title=title,
            description=description,
            author=author,
            date=date,
            blobs=dict(sorted(blobs.items())),
        )
        self.history[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit


def is_large(path: str, size: int, sample: bytes, gitattributes: bytes, threshold: int) -> bool:
    """Whether a new file goes to LFS: by the repository's `.gitattributes`, by its size, or because it is binary."""
    rules = [line.split() for line in gitattributes.decode().splitlines()]
    patterns = [rule[0] for rule in rules if "filter=lfs" in rule]
    by_name = any(fnmatch.fnmatchcase(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
    return size > 0 and (by_name or size > threshold or b"\0" in sample)


def is_ignored(path: str, gitignore: str) -> bool:
    """Whether a `.gitignore` at the root excludes `path`; the last rule that matches decides, as in git."""
    ignored = False
    for line in gitignore.splitlines():
        rule = line.strip()
        if rule and not rule.startswith("#") and _rule_matches(rule.removeprefix("!"), path):
            ignored = not rule.startswith("!")
    return ignored


def _rule_matches(rule: str, path: str) -> bool:
    parts = path.split("/")
    folders = ["/".join(parts[:n]) for n in range(1, len(parts))]
    candidates: Iterable[str] = folders if rule.endswith("/") else [*folders, path]
    rule = rule.rstrip("/")
    if "/" in rule:  # anchored at the root
        return any(fnmatch.fnmatchcase(candidate, rule.lstrip("/")) for candidate in candidates)
    return any(fnmatch.fnmatchcase(candidate.rsplit("/", 1)[-1], rule) for candidate in candidates)
