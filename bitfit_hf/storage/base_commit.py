"""Which commit of its repository a base was loaded from.

transformers resolves the commit of every load, but a loaded model no longer says which one it was. The cache does: it
keeps each commit in a folder of its name. The one is taken whose weights are the model's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open

from .fingerprint import TensorPrint, decode


def base_commit(name: str | None, fingerprint: Mapping[str, Any] | None) -> str | None:
    """Finds the cached commit of a base by its weights. Nothing is downloaded.

    Args:
        name (`str`, *optional*): What the base was loaded from.
        fingerprint (`Mapping[str, Any]`, *optional*): The model's, see [`bitfit_hf.storage.fingerprint`].

    Returns:
        `str`: The commit, or `None` for a local folder and where none of the commits in the cache has these weights.
    """
    if not fingerprint:
        return None
    expected = decode(dict(fingerprint))
    return next((path.name for path in cached_commits(name) if _has_weights(path, expected)), None)


def cached_commits(name: str | None) -> list[Path]:
    """The folders of a repository's commits in the cache, that of the default branch first and then the latest.

    Args:
        name (`str`, *optional*): What a base was loaded from; a local folder has no commits.
    """
    if not name or os.path.exists(name):
        return []
    try:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    except HFValidationError:  # a folder that is gone
        return []
    main = folder / "refs" / "main"
    current = main.read_text().strip() if main.is_file() else ""
    found = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    return sorted(found, key=lambda path: (path.name != current, -path.stat().st_mtime))


def _has_weights(snapshot: Path, expected: Mapping[str, TensorPrint]) -> bool:
    compared = 0
    for path in snapshot.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                stored = set(file.keys())
                for key, wanted in _pairs(stored, expected):
                    found = TensorPrint.of(file.get_tensor(key), whole=bool(wanted.digests))
                    if wanted.difference(found) is not None:
                        return False
                    compared += 1
        except (SafetensorError, OSError):
            return False
    return compared > 0


def _pairs(stored: set[str], expected: Mapping[str, TensorPrint]) -> Iterator[tuple[str, TensorPrint]]:
    """Tensors of a file and of a model that have one name, but for a backbone's prefix on either side."""
    prefixes = ("", *sorted({f"{key.partition('.')[0]}." for key in stored}))
    for name, wanted in expected.items():
        for candidate in (*(prefix + name for prefix in prefixes), name.partition(".")[2]):
            if candidate in stored:
                yield candidate, wanted
                break
