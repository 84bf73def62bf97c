"""The files of a delta: names, strict reading, atomic writing, and the digest that ties a pair together.

A delta is two files that only mean something together. They cannot be renamed in one step, so `adapter_config.json`
names the SHA-256 of the tensors it was saved with, and reading refuses a pair that does not match. The weights file is
the commit point, see [`write_pair`].
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from ..errors import DeltaFormatError, DeltaIOError, DeltaNotFoundError, NonFiniteDeltaError, collect
from .keys import from_file, is_added

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PICTURE_FILE = "bias_change.png"
LORA_FOLDER = "stock"  # the export as a LoRA adapter, for libraries without bitfit_hf
PENDING_CONFIG_FILE = ".adapter_config.pending.json"

_TABLES = ("bias_layout", "tensors")  # with one entry for each tensor
_MAX_CONFIG_BYTES = 64 * 2**20
_ATTEMPTS, _PAUSE = 8, 0.02  # seconds; a save takes a few milliseconds between its two files


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever the order and the key prefix.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): The delta and the head, as saved.

    Returns:
        `str`: `"sha256:"` and 64 hexadecimal digits.
    """
    total = hashlib.sha256()
    for name, tensor in sorted((from_file(key), value) for key, value in tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous()
        total.update(values.view(torch.uint8).numpy().tobytes() if values.dim() else values.numpy().tobytes())
    return f"sha256:{total.hexdigest()}"


@dataclass(frozen=True)
class SavedState:
    """What is known of tensors that are being saved, also after they are gone.

    Args:
        digest (`str`): Of all of them, see [`digest`].
        num_parameters (`int`): How many scalars they have, delta and head.
        num_token_parameters (`int`): How many of these belong to added tokens.
    """

    digest: str
    num_parameters: int
    num_token_parameters: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> SavedState:
        """Of the tensors by their key in the file."""
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        return cls(digest(tensors), sum(sizes.values()), sum(n for name, n in sizes.items() if is_added(name)))


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads an `adapter_config.json`.

    Raises:
        [`DeltaNotFoundError`]: There is none.
        [`DeltaFormatError`]: It is no JSON object.
        [`DeltaIOError`]: It cannot be read.
    """
    try:
        if os.path.getsize(path) > _MAX_CONFIG_BYTES:
            raise DeltaFormatError(f"{path}: too large for a configuration; fetch the delta again.")
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError as error:
        raise DeltaNotFoundError(
            f"{path} does not exist: this is no delta. Pass the folder or Hub repo that a BitFit model was saved to."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DeltaFormatError(f"{path} is not valid JSON ({error}); fetch the delta again.") from error
    except OSError as error:
        raise DeltaIOError(f"{path} cannot be read: {error}. Check the path, its permissions and the disk.") from error
    if not isinstance(values, dict):
        raise DeltaFormatError(f"{path} holds a {type(values).__name__} instead of an object; fetch the delta again.")
    return values


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Reads a safetensors file on the CPU, each tensor in memory of its own.

    The copies matter: CPU kernels round differently for differently aligned memory, and a tensor inside a file sits at
    any address.

    Raises:
        [`DeltaNotFoundError`]: There is no such file.
        [`DeltaFormatError`]: It is truncated or damaged.
        [`DeltaIOError`]: It cannot be read.
    """
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu"):
            pass  # its header fits its size: before that is known, no byte of it is read into memory
        # Not tensor by tensor: safetensors 0.8.0 leaves two objects behind for each that it reads from an open file,
        # which a server notices whose tasks come and go.
        tensors = deserialize(Path(path).read_bytes())
        return {name: tensors.pop(name).clone() for name in list(tensors)}
    except FileNotFoundError as error:
        pickled = Path(path).with_suffix(".bin")
        hint = (
            f" {pickled.name} is there, but pickled weights are never read; save the delta again."
            if (pickled.exists())
            else " The folder is incomplete; save or fetch the delta again."
        )
        raise DeltaNotFoundError(f"{path} does not exist.{hint}") from error
    except SafetensorError as error:
        raise DeltaFormatError(
            f"{path} is damaged or no safetensors file ({error}); save or fetch the delta again."
        ) from error
    except OSError as error:
        raise DeltaIOError(f"{path} cannot be read: {error}. Check the path, its permissions and the disk.") from error


def check_digest(tensors: Mapping[str, torch.Tensor], expected: str | None, *, where: str) -> None:
    """Raises [`DeltaFormatError`] where `tensors` are not those that the configuration was saved with."""
    if expected is not None and digest(tensors) != expected:
        raise DeltaFormatError(
            f"{where}: {CONFIG_FILE} and {WEIGHTS_FILE} come from two different saves, or the weights are damaged "
            "(their digests differ). Save or fetch the delta again."
        )


def check_values(tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Raises [`DeltaFormatError`] where a tensor is not float32 or not finite; all such tensors are named at once."""
    problems = []
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point and name.endswith(("num_batches_tracked", "position_ids")):
            continue  # integer buffers of a head's modules
        if tensor.dtype != torch.float32:
            problems.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')} instead of float32")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} holds NaN or Inf")
    if problems:
        raise DeltaFormatError(
            f"{where}: the tensors of this delta cannot be used:{collect(problems)}\nSave or fetch the delta again."
        )


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises [`NonFiniteDeltaError`] where a tensor that is about to be saved holds NaN or Inf; names all such."""
    problems = [
        f"{name} holds NaN or Inf"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all())
    ]
    if problems:
        raise NonFiniteDeltaError(
            f"Training has left tensors that are no numbers, so there is no result to save:{collect(problems)}\n"
            "Nothing was written. Train again with a lower learning rate, from the start or an earlier checkpoint."
        )


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replaces a file by `data` in one step, and makes it last: after a crash it holds the old or the new content.

    Raises:
        [`DeltaIOError`]: It cannot be written (permissions, full disk); the old file is as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise DeltaIOError(f"{path} cannot be written: {error}") from error


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of a safetensors file with `tensors`, in the order of their names."""
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    return serialize(plain, metadata={"format": "pt"})


def encode_config(values: Mapping[str, Any]) -> bytes:
    """The bytes of an `adapter_config.json`: indented JSON, in which a tensor takes one line of each table."""
    return (_indented(json.loads(json.dumps(values))) + "\n").encode()


def _indented(value: Any, *, name: str = "", indent: str = "") -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    inner = indent + "  "
    items = []
    for key in sorted(value, key=lambda key: (int(key) if key.isdecimal() else -1, key)):
        item = value[key]
        text = json.dumps(item, sort_keys=True) if name in _TABLES else _indented(item, name=key, indent=inner)
        items.append(f"{inner}{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def write_pair(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Saves a delta's two files so that a crash at any moment leaves the old pair or the new one.

    The new configuration waits in a file of its own while the weights are replaced, which is the commit point; then it
    takes its place. [`read_pair`] knows to look for it.

    Args:
        folder (`str` or `os.PathLike`): Where to; made if it does not exist.
        config (`Mapping[str, Any]`): Values of `adapter_config.json`; the digest is added.
        tensors (`Mapping[str, torch.Tensor]`): The tensors by their key in the file.

    Raises:
        [`DeltaIOError`]: A file cannot be written; what was there is as it was.
    """
    folder = Path(folder)
    values = {**config, "weights_digest": digest(tensors)}
    with _only_writer(folder):
        pending = folder / PENDING_CONFIG_FILE
        try:
            write_bytes(pending, encode_config(values))
            write_bytes(folder / WEIGHTS_FILE, encode_tensors(tensors))
        except DeltaIOError:
            with contextlib.suppress(OSError):
                pending.unlink()
            raise
        try:
            os.replace(pending, folder / CONFIG_FILE)
            _sync_folder(folder)
        except OSError as error:
            raise DeltaIOError(f"{folder / CONFIG_FILE} cannot be written: {error}") from error


def read_pair(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Reads a delta's two files, as they were written together.

    Returns:
        `tuple[dict, dict]`: Values of the configuration, and the tensors by their key in the file.

    Raises:
        [`DeltaNotFoundError`]: One of the files is missing.
        [`DeltaFormatError`]: One is damaged, or they come from two different saves.
        [`DeltaIOError`]: One cannot be read.
    """
    folder = Path(folder)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)  # somebody may be saving just now
        waiting = _waiting_config(folder)
        if waiting is not None and not (folder / CONFIG_FILE).exists():
            values = waiting  # the first save was cut short
        else:
            values = read_config(folder / CONFIG_FILE)
        tensors = read_tensors(folder / WEIGHTS_FILE)
        found = digest(tensors)
        for candidate in (values, waiting):
            if candidate is not None and candidate.get("weights_digest") in (found, None):
                return candidate, tensors
    check_digest(tensors, values["weights_digest"], where=str(folder))
    raise AssertionError("unreachable: the digests differ")


def _waiting_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that a save in progress, or one that was cut short, has written; damaged ones do not count."""
    try:
        return read_config(folder / PENDING_CONFIG_FILE)
    except (DeltaNotFoundError, DeltaFormatError):
        return None


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    # The lock lies outside the folder, which holds a delta's files and no others.
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
    with FileLock(Path(tempfile.gettempdir()) / f"bitfit_hf-{name}.lock"):
        yield


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
