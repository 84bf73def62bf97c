"""The life of an adapter, as far as its configuration takes part in it.

1. A configuration is made by the user, or read from a file. One from a file **awaits its tensors**: until they are in
   the model it describes what they are, and is not to be completed with what this version would choose.
2. [`tensors_loaded`]: from now on the tensors may change, and nothing that was read speaks of them any more.
3. [`about_to_save`]: tensors have been taken out of the model; a configuration that is saved next belongs to them.
   PEFT asks for the tensors before it saves the configuration, and all that it hands on is the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import BitFitConfig, label_problems
from ..errors import ConfigError, collect
from ..storage.files import SavedState, check_finite


def awaits_tensors(config: BitFitConfig) -> bool:
    """Whether a configuration describes tensors that are still to be loaded."""
    return config.bitfit_version is not None


def await_tensors(config: BitFitConfig) -> None:
    """Says that tensors follow which the configuration describes, although it may not come from a file."""
    from .. import __version__

    config.bitfit_version = config.bitfit_version or __version__


def tensors_loaded(config: BitFitConfig) -> None:
    """Says that the tensors that belong to the configuration are in the model; from now on they may change."""
    config.bitfit_version = None
    config.weights_digest = None


def begin_anew(config: BitFitConfig) -> None:
    """Makes the configuration of an existing adapter, or of a file, that of a new adapter on the same base."""
    tensors_loaded(config)
    config.last_state = config.run = None


def about_to_save(config: BitFitConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Says that a configuration which is saved next belongs to these tensors.

    Args:
        config ([`BitFitConfig`]): Of the adapter.
        tensors (`Mapping[str, torch.Tensor]`): Delta and head by their key in the file.

    Raises:
        [`NonFiniteDeltaError`]: They hold NaN or Inf; nothing has been written.
    """
    check_finite(tensors)
    config.last_state = SavedState.of(tensors)
    if config.run is not None and config.run.weights_digest not in (None, config.last_state.digest):
        config.run = None  # it tells how other tensors came about


def restore_given_base(config: BitFitConfig) -> None:
    """Puts back the base's name that the user gave, if there was one, in place of the path that PEFT has set."""
    config.base_model_name_or_path = config.given_base or config.base_model_name_or_path


def set_labels(
    config: BitFitConfig, num_labels: int, id2label: Mapping[Any, Any], problem_type: str | None, *, adapter_name: str
) -> None:
    """Replaces the labels by those that the model has when its delta is saved.

    Args:
        config ([`BitFitConfig`]): Of the adapter.
        num_labels (`int`): How many labels the model's config has.
        id2label (`Mapping`): Their names.
        problem_type (`str`, *optional*): transformers' name of the loss.
        adapter_name (`str`): Whose labels they are, for messages.

    Raises:
        [`ConfigError`]: A delta with these labels could not be loaded; the configuration is as it was.
    """
    if config.num_labels not in (None, num_labels):
        raise ConfigError(
            f"The model's config names {num_labels} labels, and the head of adapter {adapter_name!r} has "
            f"{config.num_labels} outputs. Name as many in `model.config.id2label`, then save again."
        )
    if problems := label_problems(num_labels, dict(id2label), problem_type):
        raise ConfigError(
            f"The model's config holds labels of adapter {adapter_name!r} that no delta can be loaded with:"
            f"{collect(problems)}\nMend `model.config`, then save again."
        )
    config.num_labels, config.problem_type = num_labels, problem_type
    config.id2label = {int(index): label for index, label in id2label.items()}
