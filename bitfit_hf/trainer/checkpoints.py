"""Checkpoints of a model with deltas injected in place, which a Trainer resumes from and takes the best model from.

The Trainer reloads the adapters of a `PeftModel` only. For any other model it reads `model.safetensors` and calls
`load_state_dict(strict=False)`. So a checkpoint gets such a file, with the adapter's tensors under their live names
and no base weights, and the model learns that a state dict of this kind lacks nothing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..errors import DeltaMismatchError, collect
from ..storage.files import encode_tensors, write_bytes
from ..tuner.layer import PREFIX
from ..tuner.state import delta_parameters, head_tensors, tuned_layers

RESUME_FILE = "model.safetensors"

_accepting: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_ours(name: str) -> bool:
    """Whether a live name is that of a delta or of a head's copy, of whichever adapter."""
    parts = name.split(".")
    return "modules_to_save" in parts or any(part.startswith(PREFIX) for part in parts)


def live_names(model: nn.Module, adapter_name: str) -> list[str]:
    """The names of the adapter's deltas and head in `model.state_dict()`; a tied delta under each of its names."""
    tensors = [*delta_parameters(model, adapter_name).values(), *head_tensors(model, adapter_name).values()]
    live = set(map(id, tensors))
    return [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in live]


def write_checkpoint(model: nn.Module, adapter_name: str, folder: str | os.PathLike[str]) -> None:
    """Writes the file that a Trainer resumes from into its checkpoint.

    Args:
        model (`nn.Module`): With the adapter injected in place.
        adapter_name (`str`): The adapter that is trained.
        folder (`str` or `os.PathLike`): The checkpoint, `checkpoint-<step>`.

    Raises:
        [`DeltaIOError`]: It cannot be written.
    """
    state = model.state_dict()
    tensors = {name: state[name] for name in live_names(model, adapter_name)}
    write_bytes(Path(folder) / RESUME_FILE, encode_tensors(tensors))


def accept_checkpoints(model: nn.Module) -> None:
    """Makes `model.load_state_dict` take what [`write_checkpoint`] wrote as complete, and less than that as an error.

    Without it the Trainer warns of every tensor of the base as missing when it resumes, and says no more when it is
    the deltas that are missing, or when they were saved by a model that was wrapped otherwise. State dicts that hold
    anything of the base are treated as ever.

    Args:
        model (`nn.Module`): With an adapter injected, in place or wrapped.
    """
    if model not in _accepting:
        in_place = not isinstance(model, PeftModel)
        model.register_load_state_dict_post_hook(_without_frozen_base if in_place else _without_strangers)
        _accepting.add(model)


def _without_frozen_base(model: nn.Module, incompatible: Any) -> None:
    missing = set(incompatible.missing_keys)
    names = list(model.state_dict(keep_vars=True))
    loaded = [name for name in names if is_ours(name) and name not in missing]
    ours = loaded or any(map(is_ours, incompatible.unexpected_keys))
    if not ours or not missing.issuperset(name for name in names if not is_ours(name)):
        return
    active = {name for _, layer in tuned_layers(model) for name in layer.active_adapters}
    lost = [name for adapter in sorted(active) for name in live_names(model, adapter) if name in missing]
    _raise_for(lost, incompatible.unexpected_keys)
    incompatible.missing_keys.clear()


def _without_strangers(model: nn.Module, incompatible: Any) -> None:
    _raise_for([], filter(is_ours, incompatible.unexpected_keys))


def _raise_for(lost: Iterable[str], strange: Iterable[str]) -> None:
    problems = [f"{name} is missing" for name in lost] + [f"{name} is not in the model" for name in strange]
    if problems:
        raise DeltaMismatchError(
            f"The checkpoint does not hold what this model tunes:{collect(problems)}\n"
            "Resume as it was saved: with the same BitFitConfig and adapter name, and with a stock model again or a "
            "wrapped one again."
        )
