"""Stock checkpoints: their model class, loading them, their tokenizer, and writing a new one in one step."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..bank.onnx.folder import GRAPH_FILE
from ..config import BitFitConfig
from ..errors import CheckpointError, OutputError
from ..hub.contents import TOKENIZER_FILES
from ..storage.files import CONFIG_FILE
from ..terms.tasks import BY_PEFT_NAME

MODEL_CONFIG = "config.json"


def is_local(path_or_repo: str) -> bool:
    """Whether a folder is meant. Nothing that looks like a path is ever looked up on the Hub.

    Raises:
        [`CheckpointError`]: It looks like a path, and there is no such folder.
    """
    path = Path(path_or_repo)
    if path.is_dir():
        return True
    if path.exists():
        raise CheckpointError(f"{path_or_repo} is a file; pass the folder of a model, or a Hub repo.")
    if path.is_absolute() or path_or_repo.startswith((".", "~")) or len(path.parts) > 2:
        raise CheckpointError(f"There is no folder {path_or_repo}.")
    return False


def is_base(path_or_repo: str, *, revision: str | None = None, token: str | None = None) -> bool:
    """Whether a folder or repo holds a model and no delta. What cannot be found is left to the reader of deltas."""
    if is_local(path_or_repo):
        names = {path.name for path in Path(path_or_repo).iterdir()}
        return MODEL_CONFIG in names and CONFIG_FILE not in names
    try:
        hf_hub_download(path_or_repo, CONFIG_FILE, revision=revision, token=token)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
    return False


def read_model_config(path_or_repo: str, *, revision: str | None = None, token: str | None = None) -> PretrainedConfig:
    """Reads the `config.json` of a checkpoint.

    Raises:
        [`CheckpointError`]: There is none, or it is of no model that transformers knows.
    """
    local = is_local(path_or_repo)
    if local and not (Path(path_or_repo) / MODEL_CONFIG).is_file():
        raise CheckpointError(f"{path_or_repo} holds no model: there is no config.json in it.")
    with reading(path_or_repo):
        return AutoConfig.from_pretrained(
            path_or_repo, revision=revision, token=token, local_files_only=local, trust_remote_code=False
        )


def model_class(
    config: PretrainedConfig, path_or_repo: str, *, task_type: str | None = None, delta: BitFitConfig | None = None
) -> Any:
    """The class to load a checkpoint with.

    Args:
        config (`PretrainedConfig`): Of the checkpoint.
        path_or_repo (`str`): Names the checkpoint in messages.
        task_type (`str`, *optional*): PEFT's name of the task, as the user gave it; goes before all else.
        delta ([`BitFitConfig`], *optional*):
            Of a delta that is to be used on the checkpoint. It names the class or the task that it was trained for;
            otherwise the class is the one that the checkpoint was saved from.

    Raises:
        [`CheckpointError`]: There is no such class.
    """
    if task_type is not None and task_type not in BY_PEFT_NAME:
        raise CheckpointError(f"--task-type {task_type!r} is not one of {', '.join(BY_PEFT_NAME)}.")
    mapping: Any = delta.auto_mapping if delta is not None and isinstance(delta.auto_mapping, Mapping) else {}
    task = task_type or (delta.task_type if delta is not None else None)
    if task in BY_PEFT_NAME:
        return getattr(transformers, BY_PEFT_NAME[task].auto_class)
    name = mapping.get("base_model_class") or next(iter(config.architectures or []), None)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise CheckpointError(
            f"The model class of {path_or_repo} is not known ({name!r} is none of transformers'). Name the task, for "
            "example `--task-type SEQ_CLS`."
        )
    return found


def build_on_meta(config: PretrainedConfig, cls: Any, path_or_repo: str) -> PreTrainedModel:
    """The architecture without weights: nothing is downloaded, and no memory is used."""
    with reading(path_or_repo), torch.device("meta"):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


def load_model(
    path_or_repo: str, cls: Any, *, revision: str | None = None, token: str | None = None, complete: bool = False
) -> PreTrainedModel:
    """Loads a checkpoint in the precision that it is stored in.

    Args:
        path_or_repo (`str`): A folder or a Hub repo. Of a folder nothing is looked up elsewhere.
        cls (`type`): Model class or auto class.
        revision (`str`, *optional*), token (`str`, *optional*): As in transformers.
        complete (`bool`, *optional*, defaults to `False`): Also checks that it has all weights but those of a head.

    Raises:
        [`CheckpointError`]: It cannot be loaded.
    """
    from ..terms import head_modules, part_of

    with reading(path_or_repo):
        model, report = cls.from_pretrained(
            path_or_repo,
            revision=revision or "main",
            token=token,
            dtype="auto",
            local_files_only=is_local(path_or_repo),
            trust_remote_code=False,
            output_loading_info=True,
        )
    if complete:
        head = head_modules(model, with_untrained_pooler=False)
        missing = [name for name in report["missing_keys"] if part_of(name, head) is None]
        if missing:
            raise CheckpointError(
                f"{path_or_repo} has no weights for {', '.join(sorted(missing)[:4])} of {type(model).__name__}"
                f"{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}, so it cannot be compared with. Is it "
                "the checkpoint that training started from?"
            )
    return model.eval()


@contextmanager
def reading(path_or_repo: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever is wrong with a user's files; `bitfit --debug` shows where
        raise CheckpointError(f"{path_or_repo} cannot be loaded: {error}") from error


def preprocessing_folder(path_or_repo: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """A local folder with the tokenizer files of a model or delta, if it has any."""
    if is_local(path_or_repo):
        return Path(path_or_repo)
    with reading(path_or_repo):
        return Path(
            snapshot_download(path_or_repo, revision=revision, token=token, allow_patterns=list(TOKENIZER_FILES))
        )


def copy_preprocessing(sources: list[Path], target: Path) -> None:
    """Copies the tokenizer files of the first of `sources` that has any."""
    for source in sources:
        found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
        for file in found:
            shutil.copyfile(file, target / file.name)
        if found:
            return


def check_output(folder: Path, *, force: bool) -> Path:
    """Says early whether a result can be written to `folder`; a model or delta in it is replaced only with `force`.

    Returns:
        `Path`: The folder's absolute path.

    Raises:
        [`OutputError`]: It cannot.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; pass the folder to write to.")
    above = next((path for path in folder.parents if path.exists()), folder)
    if above != folder and not (above.is_dir() and os.access(above, os.W_OK)):
        why = "may not be written to" if above.is_dir() else "is a file"
        raise OutputError(f"{folder} cannot be written: {above} {why}.")
    entries = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if entries and not force:
        raise OutputError(f"{folder} is not empty; pass another folder, or --force to replace the model in it.")
    if entries and not entries & {MODEL_CONFIG, CONFIG_FILE, GRAPH_FILE}:
        raise OutputError(f"{folder} holds something other than a model, which --force does not replace.")
    return folder


@contextmanager
def new_folder(folder: Path, *, force: bool) -> Iterator[Path]:
    """Gives a fresh folder to write to, which becomes `folder` in one step if all goes well and vanishes if not.

    Args:
        folder (`Path`): The folder to make.
        force (`bool`): Replaces the model or delta that is there.

    Raises:
        [`OutputError`]: Something is in the way, or it cannot be written.
    """
    folder = check_output(folder, force=force)
    pending = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.new"
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            pending.mkdir()
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error}") from error
        yield pending
        try:
            for path in [*pending.rglob("*"), pending]:
                _sync(path)
            _replace(folder, pending)
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def _replace(folder: Path, pending: Path) -> None:
    old = None
    if folder.exists():  # a folder cannot be renamed over one that is not empty
        old = pending.with_suffix(".old")
        os.rename(folder, old)
    try:
        os.rename(pending, folder)
    except OSError:
        if old is not None:
            with suppress(OSError):
                os.rename(old, folder)
        raise
    _sync(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Makes what was written to a file or folder last through a power failure."""
    if os.name == "nt":
        return  # Windows opens no folders, and files only with the right to write
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
