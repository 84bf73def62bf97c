"""Pushing deltas to the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,  # the root of all errors of the client's HTTP library, whichever that is
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..card.model_card import check_card_facts
from ..errors import PushError, collect
from ..storage.fetch import http_status
from ..storage.files import CARD_FILE
from .contents import GITIGNORE, contents_of, extended_gitignore, full_model_files, stale_files

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo
    from torch import nn

    from ..delta.value import BiasDelta


def push_to_hub(
    model_or_delta: nn.Module | BiasDelta | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    stock: bool = False,
    base_model: str | None = None,
    adapter_name: str = "default",
    tokenizer: Any = None,
    card: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """
    Pushes a delta and its card to the Hub: these files and no others, in one commit.

    The repository holds `adapter_config.json`, `adapter_model.safetensors`, `README.md` and, where there are any, the
    picture of the bias change, the tokenizer's files and `stock/`. No base weights, no pickle, and no path of this
    machine are in them. The commit is made on the state that this call has seen: if somebody else pushes at the same
    moment, that is reported and nothing is overwritten. An existing card keeps what its user wrote; files of other
    kinds stay.

    Args:
        model_or_delta (`nn.Module`, [`BiasDelta`], `str` or `os.PathLike`):
            A model with a BitFit adapter, a delta, or the folder of a saved one (its tokenizer's files go along).
        repo_id (`str`): `"user/name"`, or `"name"` for a repository of one's own. Made if it does not exist.
        private (`bool`, *optional*): Whether a new repository is private; by default the Hub decides.
        revision (`str`, *optional*): Branch to push to, made if it does not exist; `"main"` by default.
        token (`str` or `bool`, *optional*): The token of whoever pushes; that of `hf auth login` by default.
        commit_message (`str`, *optional*): `"Push BitFit delta"` by default.
        create_pr (`bool`, *optional*, defaults to `False`): Opens a pull request instead.
        stock (`bool`, *optional*, defaults to `False`):
            Adds `stock/`, the same tuned model as a plain LoRA adapter, see [`export_stock`]. From a delta without its
            model this loads the base.
        base_model (`str`, *optional*):
            Name of the base on the Hub. Needed where it was loaded from a local folder.
        adapter_name (`str`, *optional*, defaults to `"default"`): For a model: which adapter.
        tokenizer (*optional*): A tokenizer or processor to push along.
        card (`Mapping[str, Any]`, *optional*):
            Facts for the model card, as for [`BitFitCallback`]: `license`, `language`, `dataset`, `dataset_config`,
            `eval_split`, `widget`. They win over what is on the card.

    Returns:
        `huggingface_hub.CommitInfo`: With the commit's `oid` and, for a pull request, its `pr_url`.

    Raises:
        [`PushError`]: It was refused or failed, for the reason and with the remedy that the message names. Nothing
            was overwritten.
        [`StockExportError`]: With `stock=True`: stock PEFT could not represent the delta.

    Example:

    ```python
    push_to_hub(model, "user/bert-base-rte-bitfit", tokenizer=tokenizer)
    ```
    """
    facts = check_card_facts(card)
    contents = contents_of(
        model_or_delta, base_model=base_model, stock=stock, adapter_name=adapter_name, tokenizer=tokenizer
    )
    contents.facts = facts
    api = HfApi()
    with _explained(repo_id):
        if not create_pr:
            repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        info = _look(api, repo_id, revision=revision, token=token, make_branch=not create_pr)
        present = [file.rfilename for file in info.siblings or []]
        if private and not info.private:
            raise PushError(
                f"{repo_id} exists and is public, and private=True was asked for. Make it private on the Hub first, "
                "or push without `private`. Nothing was pushed."
            )
        if full_model_files(present):
            raise PushError(
                f"{repo_id} holds a whole model:{collect(full_model_files(present))}\nA delta beside it would be "
                "loaded in its place. Choose a repository of its own for the delta. Nothing was pushed."
            )
        there = {
            name: _download(api, repo_id, name, info.sha, token) for name in (CARD_FILE, GITIGNORE) if name in present
        }
        files = contents.files(repo_id, on_hub=there.get(CARD_FILE))
        files |= extended_gitignore(there.get(GITIGNORE, b""), files)
        additions = [CommitOperationAdd(path, data) for path, data in files.items()]
        deletions = [CommitOperationDelete(path) for path in stale_files(present, files)]
        _upload_large(api, repo_id, additions, revision=revision, token=token, create_pr=create_pr)
        return api.create_commit(
            repo_id,
            [*additions, *deletions],
            commit_message=commit_message or "Push BitFit delta",
            token=token,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )


def _look(api: HfApi, repo_id: str, *, revision: str | None, token: str | bool | None, make_branch: bool) -> ModelInfo:
    """The state of the branch that is going to be pushed to."""
    try:
        return api.model_info(repo_id, revision=revision, token=token)
    except RevisionNotFoundError:
        if not make_branch or revision is None or revision.startswith("refs/"):
            raise
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        return api.model_info(repo_id, revision=revision, token=token)


def _download(api: HfApi, repo_id: str, file: str, commit: str | None, token: str | bool | None) -> bytes:
    return Path(api.hf_hub_download(repo_id, file, revision=commit, token=token)).read_bytes()


def card_on_hub(
    name: str, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[str, bytes | None]:
    """The card that a repository has at present.

    Args:
        name (`str`): `"user/name"`, or `"name"` for a repository of one's own.
        revision (`str`, *optional*), token (`str` or `bool`, *optional*): As for [`push_to_hub`].

    Returns:
        `tuple[str, bytes | None]`: The full repo id, and the `README.md`; `None` where there is none yet.

    Raises:
        [`PushError`]: The Hub does not answer or refuses.
    """
    api = HfApi()
    with _explained(name):
        repo_id = name if "/" in name else f"{api.whoami(token=token)['name']}/{name}"
        try:
            info = api.model_info(repo_id, revision=revision, token=token)
            return repo_id, _download(api, repo_id, CARD_FILE, info.sha, token)
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
            return repo_id, None


def _upload_large(
    api: HfApi,
    repo_id: str,
    additions: list[CommitOperationAdd],
    *,
    revision: str | None,
    token: str | bool | None,
    create_pr: bool,
) -> None:
    """Uploads what goes to git LFS, and makes sure that the commit will hold every file.

    The Hub leaves out what a `.gitignore` in the repository excludes, without a word: a new configuration beside old
    weights would be the result.
    """
    api.preupload_lfs_files(repo_id, additions, token=token, revision=revision, create_pr=create_pr, free_memory=False)
    ignored = [addition.path_in_repo for addition in additions if addition._should_ignore]
    if ignored:
        raise PushError(
            f"The .gitignore in {repo_id} excludes files of the delta:{collect(ignored)}\nRemove these rules, or the "
            "file, on the Hub, and push again. Nothing was pushed."
        )


# --- errors ---


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turns what the client raises during a push into one [`PushError`] that names the remedy."""
    try:
        yield
    except PushError:
        raise
    except HFValidationError as error:
        raise PushError(f"{repo_id!r} is no repo id: pass 'user/name'. ({error})") from error
    except LocalTokenNotFoundError as error:
        raise PushError(f"Pushing to {repo_id} takes a token: run `hf auth login`, or pass `token`.") from error
    except OfflineModeIsEnabled as error:
        raise PushError(f"Cannot push to {repo_id} in offline mode: unset HF_HUB_OFFLINE.") from error
    except (HTTPError, OSError, ValueError) as error:
        status = http_status(error)
        if status is not None:
            remedy = _REMEDIES.get(status) or (_REMEDIES[500] if status >= 500 else "see the Hub's answer")
            raise PushError(f"{repo_id} could not be pushed to (HTTP {status}): {remedy}. ({error})") from error
        if isinstance(error, ValueError) and not isinstance(error, (HTTPError, OSError)):
            raise PushError(f"The Hub does not accept what was to be pushed to {repo_id}: {error}") from error
        raise PushError(
            f"The connection to the Hub failed while pushing to {repo_id}. If the commit was already under way it may "
            f"have arrived: look at the repository, then push again. ({type(error).__name__}: {error})"
        ) from error


_REMEDIES = {
    400: "the Hub does not accept the request; its answer says what is wrong",
    401: "the token is missing or not valid: run `hf auth login`, or pass `token`",
    403: "the token may not write here: use one with the role 'write' and a namespace of your own, or pass "
    "`create_pr=True` to propose the delta",
    404: "there is no such repository or revision, or the token may not see it: check both names and the token",
    409: "the Hub is busy with another change to this repository: push again in a moment",
    412: "somebody else has changed the repository since this push looked at it, and nothing was overwritten: look at "
    "that change, then push again",
    413: "a file is larger than the Hub takes",
    429: "too many requests: wait a few minutes, then push again",
    500: "the Hub has a problem of its own: try again later (https://status.huggingface.co)",
}
