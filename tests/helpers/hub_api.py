"""The Hub's JSON endpoints, as far as model repositories need them.

What they answer was read off the client (`hf_api.py`, `_commit_api.py`): field names, status codes, `X-Error-Code`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import yaml
from hub_http import Request, Response, Router, find_repo, require_user, require_writer
from hub_metadata import read_header, validate_card
from hub_store import Blob, Commit, HubError, Repo, is_ignored

if TYPE_CHECKING:
    from hub_server import LoopbackHub

_API = "/api/models/{repo_id}"
route = Router()


@route("GET", "/api/whoami-v2")
def whoami(hub: LoopbackHub, request: Request) -> Response:
    user = require_user(request)
    token = {"displayName": "test", "role": "read" if user.read_only else "write"}
    return Response.from_json(
        {
            "type": "user",
            "id": user.name,
            "name": user.name,
            "fullname": user.name,
            "orgs": [{"type": "org", "name": org} for org in user.orgs],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LoopbackHub, request: Request) -> Response:
    errors, warnings = validate_card(request.json["content"])
    status = 400 if errors else 200
    if request.headers.get("Accept") == "text/plain":  # `ModelCard.validate` shows the text as it is
        return Response("\n".join(errors).encode(), status, {"Content-Type": "text/plain"})
    messages = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return Response.from_json(messages, status)


@route("POST", "/api/repos/create")
def create(hub: LoopbackHub, request: Request) -> Response:
    if request.json.get("type", "model") != "model":
        raise HubError(400, f"LoopbackHub keeps models only, not {request.json['type']!r}")
    repo_id = _requested_id(request)
    user = require_writer(request, repo_id.split("/")[0])
    url = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}
    if repo_id in hub.repos:
        return Response.from_json({"error": "You already created this model repo", **url}, 409)
    private = bool(request.json.get("private")) or request.json.get("visibility") == "private"
    hub.create_repo(repo_id, private=private, user=user.name)
    return Response.from_json(url)


def _requested_id(request: Request) -> str:
    return f"{request.json.get('organization') or require_user(request).name}/{request.json['name']}"


@route("GET", _API)
@route("GET", _API + "/revision/{revision}")
def info(hub: LoopbackHub, request: Request, repo_id: str, revision: str = "main") -> Response:
    repo = find_repo(hub, request, repo_id)
    commit = repo.resolve(revision)
    try:
        card = read_header(commit.files.get("README.md", b"").decode())
    except (ValueError, yaml.YAMLError):  # not UTF-8, or not YAML
        card = {}
    return Response.from_json(
        {
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.namespace,
            "sha": commit.oid,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "createdAt": timestamp(repo.log()[-1].date),
            "lastModified": timestamp(commit.date),
            "tags": card.get("tags") or [],
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "siblings": [_sibling(path, blob, "blobs" in request.query) for path, blob in commit.blobs.items()],
        }
    )


@route("GET", _API + "/tree/{revision}")
@route("GET", _API + "/tree/{revision}/{path}")
def tree(hub: LoopbackHub, request: Request, repo_id: str, revision: str, path: str = "") -> Response:
    commit = find_repo(hub, request, repo_id).resolve(revision)
    prefix = f"{path.strip('/')}/" if path else ""
    entries = _tree_entries(commit)
    inside = [entry for name, entry in entries.items() if name.startswith(prefix)]
    if prefix and not inside:
        raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
    if request.query.get("recursive") != ["true"]:
        inside = [entry for entry in inside if "/" not in entry["path"][len(prefix) :]]
    return Response.from_json(inside)


@route("POST", _API + "/branch/{branch}")
def branch(hub: LoopbackHub, request: Request, repo_id: str, branch: str) -> Response:
    repo = find_repo(hub, request, repo_id, write=True)
    if branch.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {branch}")
    repo.create_ref(f"refs/heads/{branch}", repo.resolve(request.json.get("startingPoint") or "main").oid)
    return Response.from_json({})


@route("POST", _API + "/preupload/{revision}")
def preupload(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Response:
    """Tells the client, per file, how to upload it, whether to leave it out, and what is there already."""
    repo = find_repo(hub, request, repo_id, write=request.query.get("create_pr") != ["1"])
    current = repo.resolve(revision)
    gitignore = request.json.get("gitIgnore", current.files.get(".gitignore", b"").decode())
    answers = []
    for file in request.json["files"]:
        path, size = file["path"], file["size"]
        large = hub.is_large(repo, path, size, base64.b64decode(file["sample"]), revision)
        blob = current.blobs.get(path)
        answers.append(
            {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": is_ignored(path, gitignore),
                "oid": blob.etag if blob else None,
            }
        )
    return Response.from_json({"files": answers})


@route("POST", _API + "/commit/{revision}")
def commit(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Response:
    create_pr = request.query.get("create_pr") == ["1"]
    user = require_user(request)
    repo = find_repo(hub, request, repo_id, write=not create_pr and not revision.startswith("refs/pr/"))
    header: dict[str, Any] = {}
    operations = []
    for line in request.body.splitlines():
        item = json.loads(line)
        if item["key"] == "header":
            header = item["value"]
        else:
            operations.append((item["key"], item["value"]))
    new = repo.commit(
        _changes(repo, repo.resolve(revision), operations),
        author=user.name,
        title=header["summary"],
        description=header.get("description", ""),
        revision=revision,
        parent=header.get("parentCommit"),
        create_pr=create_pr,
    )
    answer = {"success": True, "commitOid": new.oid, "commitUrl": f"{hub.endpoint}/{repo_id}/commit/{new.oid}"}
    if create_pr:
        answer["pullRequestUrl"] = f"{hub.endpoint}/{repo_id}/discussions/{repo.pull_requests}"
    return Response.from_json(answer)


def _changes(repo: Repo, head: Commit, operations: list[tuple[str, dict[str, Any]]]) -> dict[str, Blob | None]:
    """What the lines of a commit do to the files of `head`."""
    changes: dict[str, Blob | None] = {}
    for key, value in operations:
        path = value["path"]
        if key == "file":
            changes[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs_objects:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            changes[path] = Blob(repo.lfs_objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.rstrip('/')}/"
            whole_folder = key == "deletedFolder"
            gone = [name for name in head.blobs if (name.startswith(folder) if whole_folder else name == path)]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            changes.update(dict.fromkeys(gone))
        else:
            raise HubError(400, f"Unknown operation in a commit: {key}")
    return changes


# Field names of the client's data classes


def timestamp(date: datetime) -> str:
    return f"{date:%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"


def _sibling(path: str, blob: Blob, with_sizes: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if with_sizes:
        sibling |= {"size": len(blob.data), "blobId": blob.git_oid}
        if blob.lfs:
            sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return sibling


def _tree_entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Files and folders of a commit by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in commit.blobs.items():
        parts = path.split("/")
        for n in range(1, len(parts)):
            folder = "/".join(parts[:n])
            oid = hashlib.sha1(f"{commit.oid} {folder}".encode()).hexdigest()
            entries.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        entries[path] = {"type": "file", "oid": blob.git_oid, "size": len(blob.data), "path": path}
        if blob.lfs:
            entries[path]["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entries
