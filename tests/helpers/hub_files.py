"""Transfer of file contents: git LFS uploads, downloads, and the "CDN" behind both.

What is answered was read off the client (`lfs.py`, `file_download.py`).
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hub_http import Request, Response, Router, find_repo, require_user
from hub_store import HubError

if TYPE_CHECKING:
    from hub_server import LoopbackHub

route = Router()

# Uploads: https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md


@route("POST", "/{repo_id}.git/info/lfs/objects/batch")
def lfs_batch(hub: LoopbackHub, request: Request, repo_id: str) -> Response:
    # The client names the branch it will commit to, or nothing if the commit will be a pull request.
    require_user(request)
    repo = find_repo(hub, request, repo_id, write="ref" in request.json)
    objects = []
    for item in request.json["objects"]:
        oid, size = item["oid"], item["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in repo.lfs_objects:
            upload: dict[str, Any] = {"href": f"{hub.cdn_endpoint}/cdn/{repo_id}/{oid}"}
            verify = {"href": f"{hub.endpoint}/{repo_id}.git/info/lfs/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return Response.from_json({"transfer": "basic", "objects": objects})


@route("POST", "/{repo_id}.git/info/lfs/verify")
def lfs_verify(hub: LoopbackHub, request: Request, repo_id: str) -> Response:
    stored = find_repo(hub, request, repo_id).lfs_objects.get(request.json["oid"])
    if stored is None or len(stored) != request.json["size"]:
        raise HubError(400, f"The uploaded file {request.json['oid']} is missing or incomplete")
    return Response.from_json({})


@route("PUT", "/cdn/{repo_id}/{oid}")
def cdn_upload(hub: LoopbackHub, request: Request, repo_id: str, oid: str) -> Response:
    _refuse_token(request)
    _store(hub, repo_id, oid, request.body)
    return Response()


@route("GET", "/cdn/{repo_id}/{oid}")
def cdn_download(hub: LoopbackHub, request: Request, repo_id: str, oid: str) -> Response:
    _refuse_token(request)
    return _content(hub, request, repo_id, request.query["path"][0], oid, hub.repos[repo_id].lfs_objects[oid])


def _store(hub: LoopbackHub, repo_id: str, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, f"The content that was sent is not that of {oid}")
    hub.repos[repo_id].lfs_objects[oid] = data


def _refuse_token(request: Request) -> None:
    """Storage behind signed URLs answers like this to a token of the Hub, which is none of its business."""
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed")


# Downloads


@route("GET|HEAD", "/{repo_id}/resolve/{revision}/{path}")
def resolve(hub: LoopbackHub, request: Request, repo_id: str, revision: str, path: str) -> Response:
    """A file's content, or for a large file the way to it."""
    commit, blob = find_repo(hub, request, repo_id, content=True).blob(revision, path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.git_oid}"'}
    if not blob.lfs:
        response = _content(hub, request, repo_id, path, blob.etag, blob.data)
        return Response(response.body, response.status, {**response.headers, **headers})
    size = len(hub.corrupted.get(blob.etag, blob.data))
    linked = {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{blob.etag}"'}
    location = f"{hub.cdn_endpoint}/cdn/{repo_id}/{blob.sha256}?path={quote(path)}"
    return Response(b"", 302, {**headers, **linked, "Location": location})


def _content(hub: LoopbackHub, request: Request, repo_id: str, path: str, etag: str, data: bytes) -> Response:
    data = hub.corrupted.get(etag, data)
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", "ETag": f'"{etag}"'}
    if request.method == "GET":
        hub.downloads[repo_id, path] += 1
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if match is None:
        return Response(data, 200, headers)
    start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
    if start >= len(data):
        raise HubError(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    return Response(data[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})
