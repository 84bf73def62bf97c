"""Checkpoints, which a Trainer saves, resumes from and takes the best model from.

The Trainer reloads the adapters of a `PeftModel` only. For any other model it reads `model.safetensors` and calls
`load_state_dict(strict=False)`. So a checkpoint of a model with deltas injected in place gets such a file, with the
adapter's tensors under their live names and no base weights, and the model learns that a state dict of this kind lacks
nothing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..config import BitFitConfig
from ..errors import (
    AdapterNameError,
    DeltaFormatError,
    DeltaMismatchError,
    DeltaNotFoundError,
    TrainerSetupError,
    collect,
)
from ..storage.files import CONFIG_FILE, encode_tensors, read_config, write_bytes
from ..storage.fingerprint import check_base
from ..storage.keys import is_adapters
from ..tuner.added_tokens import base_rows_of
from ..tuner.state import delta_parameters, head_tensors, tuned_layers
from .checks import adapter_configs

RESUME_FILE = "model.safetensors"

_accepting: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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


@contextmanager
def saved_as_own(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Makes an adapter the active one for as long as a Trainer saves.

    Of a model with adapters in place, transformers saves the active one, which need not be the Trainer's: several
    tasks can be trained on one base. PEFT saves every adapter of a wrapped model.

    Args:
        model (`nn.Module`): The Trainer's model.
        adapter_name (`str`): The adapter that the Trainer trains.

    Raises:
        [`AdapterNameError`]: The model does not have it any more.
        [`TrainerSetupError`]: Another adapter is merged, which activating this one would undo.
    """
    layers = [layer for _, layer in tuned_layers(model)] if isinstance(model, PreTrainedModel) else []
    if not layers or layers[0].active_adapters == [adapter_name]:
        yield
        return
    names = list(adapter_configs(model))
    if adapter_name not in names:
        raise AdapterNameError(
            f"The adapter {adapter_name!r} of this Trainer is not in the model any more (it has {names}), so the "
            "Trainer has nothing of its own to save. Save before `delete_adapter`."
        )
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise TrainerSetupError(
            f"The Trainer's adapter {adapter_name!r} is not the active one, and {', '.join(map(repr, merged))} is "
            "merged into the model, so adapters cannot be switched for saving. Call `unmerge()` on the layers first."
        )
    active = layers[0].active_adapters
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.set_adapter(adapter_name)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_adapter(active)  # type: ignore[operator]
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad


def check_resumable(model: nn.Module, adapter_name: str, checkpoint: str | os.PathLike[str]) -> None:
    """Checks, before a Trainer loads a checkpoint, that it was saved on this base and with a head of this size.

    Args:
        model (`nn.Module`): The Trainer's model.
        adapter_name (`str`): The adapter that is trained.
        checkpoint (`str` or `os.PathLike`): The checkpoint's folder.

    Raises:
        [`BaseModelMismatchError`]: It was saved on another base; [`base_mismatch`] says whether that counts.
        [`DeltaMismatchError`]: Its head has another number of labels.
        [`DeltaFormatError`], [`ConfigError`], [`DeltaIOError`]: Its `adapter_config.json` cannot be used.
    """
    named = Path(checkpoint, adapter_name, CONFIG_FILE)  # where PEFT saves all adapters but "default"
    path = named if named.exists() else Path(checkpoint, CONFIG_FILE)
    try:
        values = read_config(path)
    except DeltaNotFoundError:
        return  # the Trainer says what is missing
    if values.get("peft_type") != BitFitConfig().peft_type:
        raise DeltaFormatError(
            f"{path} is of the method {values.get('peft_type')!r}, not 'BITFIT'. Resume with the method that saved it."
        )
    saved = BitFitConfig.from_peft_type(**BitFitConfig.check_kwargs(**values))
    check_base(
        model,
        saved.base_fingerprint,
        delta_base=saved.base_model_name_or_path,
        base_rows=base_rows_of(model, saved),
    )
    own = adapter_configs(model)[adapter_name].num_labels
    if None not in (saved.num_labels, own) and saved.num_labels != own:
        raise DeltaMismatchError(
            f"{checkpoint}: its head has {saved.num_labels} labels, and adapter {adapter_name!r} of the Trainer's "
            f"model has {own}. Resume with as many: load the base with `num_labels={saved.num_labels}`, or pass "
            f"`BitFitConfig(num_labels={saved.num_labels})`."
        )


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
        model.register_load_state_dict_post_hook(_without_frozen_base if in_place else _refuse_other_checkpoints)
        _accepting.add(model)


def _without_frozen_base(model: nn.Module, incompatible: Any) -> None:
    missing = set(incompatible.missing_keys)
    names = list(model.state_dict(keep_vars=True))
    loaded = [name for name in names if is_adapters(name) and name not in missing]
    ours = loaded or any(map(is_adapters, incompatible.unexpected_keys))
    if not ours or not missing.issuperset(name for name in names if not is_adapters(name)):
        return
    active = {name for _, layer in tuned_layers(model) for name in layer.active_adapters}
    lost = [name for adapter in sorted(active) for name in live_names(model, adapter) if name in missing]
    _raise_for(lost, incompatible.unexpected_keys)
    incompatible.missing_keys.clear()


def _refuse_other_checkpoints(model: nn.Module, incompatible: Any) -> None:
    _raise_for([], filter(is_adapters, incompatible.unexpected_keys))


def _raise_for(lost: Iterable[str], strange: Iterable[str]) -> None:
    problems = [f"{name} is missing" for name in lost] + [f"{name} is not in the model" for name in strange]
    if problems:
        raise DeltaMismatchError(
            f"The checkpoint does not hold what this model tunes:{collect(problems)}\n"
            "Resume as it was saved: with the same BitFitConfig and adapter name, and with a stock model again or a "
            "wrapped one again."
        )
