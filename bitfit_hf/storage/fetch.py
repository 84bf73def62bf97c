"""Finds a delta in a folder, or fetches it from the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,  # the root of all errors of the client's HTTP library, whichever that is
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import DeltaIOError, DeltaNotFoundError
from .files import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class Fetched:
    """
    Where the files of a delta are.

    Args:
        folder (`Path`): The local folder.
        commit (`str`, *optional*): Of the Hub repo that they come from; `None` for a folder of the user's.
    """

    folder: Path
    commit: str | None = None


def fetch_delta(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Fetched:
    """Finds the folder of a delta, downloading its two files at one commit where it is a Hub repo.

    Args:
        path_or_repo (`str` or `os.PathLike`): A folder, or a repo id. A folder of that name wins.
        revision (`str`, *optional*), subfolder (`str`, *optional*), token (`str` or `bool`, *optional*),
        cache_dir (`str` or `os.PathLike`, *optional*), local_files_only (`bool`, *optional*):
            As in huggingface_hub.

    Returns:
        [`Fetched`]: A local folder, and the commit that its files are of.

    Raises:
        [`DeltaNotFoundError`]: There is no such folder or repo, or no delta in it.
        [`DeltaIOError`]: The Hub does not answer or refuses.
    """
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise DeltaNotFoundError(f"`subfolder` has to be a folder inside {path_or_repo}, got {subfolder!r}.")
    local = Path(path_or_repo)
    if local.is_dir():
        return Fetched(local / subfolder if subfolder else local)
    name = os.fspath(path_or_repo)
    if local.exists():
        raise DeltaNotFoundError(f"{name} is a file; pass the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}.")

    def download(file: str, commit: str | None) -> Path:
        return Path(
            hf_hub_download(
                name,
                file,
                subfolder=subfolder,
                revision=commit,
                token=token,
                cache_dir=None if cache_dir is None else str(cache_dir),
                local_files_only=local_files_only,
            )
        )

    try:
        config = download(CONFIG_FILE, revision)
        # The cache keeps each commit in a folder of its name. Asking for that commit ties the second file to the
        # first, whatever is pushed in between.
        levels = 1 + len(Path(subfolder or "").parts)
        commit = config.parents[levels - 1].name
        return Fetched(download(WEIGHTS_FILE, commit).parent, commit)
    except HFValidationError as error:
        raise DeltaNotFoundError(f"{name!r} is neither a folder nor a valid repo id: {error}") from error
    except GatedRepoError as error:
        raise DeltaIOError(f"{name} is gated: accept its terms on the Hub, and pass a `token`. ({error})") from error
    except RevisionNotFoundError as error:
        raise DeltaNotFoundError(f"{name} has no revision {revision!r}. ({error})") from error
    except RepositoryNotFoundError as error:
        raise DeltaNotFoundError(
            f"There is no folder and no Hub repo {name!r}, or it is private: check the name, and pass a `token`. "
            f"({error})"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise DeltaIOError(
            f"{name} is not a folder, not in the cache, and the Hub cannot be reached{_because(error)}. Check the "
            f"connection{' and the token' if http_status(error) in (401, 403) else ''}, and try again. ({error})"
        ) from error
    except EntryNotFoundError as error:
        raise DeltaNotFoundError(
            f"{name} holds no BitFit delta: it needs {CONFIG_FILE} and {WEIGHTS_FILE} (pickled weights are never "
            f"read). ({error})"
        ) from error
    except (HTTPError, OSError) as error:
        raise DeltaIOError(f"{name} could not be fetched{_because(error)}; try again. ({error})") from error
    except RuntimeError as error:
        if "client has been closed" not in str(error):
            raise
        # Where nobody answers, huggingface_hub before 1.27 tries again with a client that it has just closed.
        raise DeltaIOError(
            f"{name} is not a folder, and the Hub cannot be reached. Check the connection, and try again. ({error})"
        ) from error


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of the client, which may have wrapped the Hub's answer."""
    while error is not None:
        response = getattr(error, "response", None) if isinstance(error, HTTPError) else None
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None


def _because(error: BaseException) -> str:
    status = http_status(error)
    return "" if status is None else f" (HTTP {status})"
