"""The files behind an adapter that a stock way of loading is about to inject.

`PeftModel.from_pretrained`, `PeftModel.load_adapter` and transformers' `load_adapter` inject an adapter first and look
at its weights afterwards; the tuner is given neither the weights nor their place. A file that is missing, damaged or
pickled would then leave an untrained adapter behind in the user's model. What they were asked to load is among their
arguments, so these are read off the call stack, and the files are checked before anything is injected.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from ..config import BitFitConfig
from ..errors import DeltaFormatError
from ..storage.fetch import fetch_delta
from ..storage.files import check_digest, check_values, read_pair
from ..storage.fingerprint import check_base
from .added_tokens import base_rows_of
from .call_stack import callers


@dataclass(frozen=True)
class Loading:
    """What a stock way of loading was asked for.

    Args:
        path_or_repo (`str`, *optional*): A folder or a repo on the Hub.
        hub_kwargs (`Mapping[str, Any]`): What goes to huggingface_hub.
        tensors (`Mapping[str, torch.Tensor]`, *optional*): The tensors themselves, where no file is read.
    """

    path_or_repo: str | None
    hub_kwargs: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor] | None = None

    def read(self, config: BitFitConfig) -> Mapping[str, torch.Tensor]:
        """Reads and checks the tensors.

        Args:
            config ([`BitFitConfig`]):
                What was read of the configuration. Where a save was cut short between its two files, it is replaced
                by the values that belong to the tensors.

        Returns:
            `Mapping[str, torch.Tensor]`: By their key in the file.

        Raises:
            [`DeltaNotFoundError`], [`DeltaFormatError`], [`DeltaIOError`]: They cannot be used.
        """
        if self.tensors is not None:
            check_values(self.tensors, where="the state dict")
            return self.tensors
        values, tensors = read_pair(self._folder())
        where = str(self.path_or_repo)
        check_values(tensors, where=where)
        if config.weights_digest not in (None, values.get("weights_digest")):
            if values.get("peft_type") != config.peft_type:
                raise DeltaFormatError(f"{where}: its configuration changed while it was being loaded; try again.")
            inference_mode = config.inference_mode
            vars(config).update(vars(BitFitConfig.from_values(values, where=where)), inference_mode=inference_mode)
        config.check_layout_known(where=where)
        if not values.get("modules_to_save"):
            config.modules_to_save = None  # PEFT has put names of its own there, and the delta has no head
        check_digest(tensors, config.weights_digest, where=where)
        return tensors

    def check_again(self, model: nn.Module) -> str | None:
        """Checks files whose tensors are about to go into an adapter that is there already.

        PEFT reads no configuration then, and the adapter's own says what base it was made on, not what base the
        tensors were trained on.

        Args:
            model (`nn.Module`): With the adapter injected.

        Returns:
            `str`: The digest that the tensors need to have, where the file names one.

        Raises:
            [`BaseModelMismatchError`]: The tensors were trained on another base than the model's.
            [`DeltaNotFoundError`], [`DeltaFormatError`], [`DeltaIOError`]: The files cannot be used.
        """
        if self.tensors is not None:
            return None
        values, _ = read_pair(self._folder())
        config = BitFitConfig.from_values(values, where=str(self.path_or_repo))
        config.check_layout_known(where=str(self.path_or_repo))
        check_base(
            model,
            config.base_fingerprint,
            delta_base=config.base_model_name_or_path,
            base_rows=base_rows_of(model, config),
        )
        return config.weights_digest

    def _folder(self) -> Path:
        assert self.path_or_repo is not None
        if os.path.isdir(self.path_or_repo):
            return Path(self.path_or_repo, self.hub_kwargs.get("subfolder") or "")
        known = inspect.signature(fetch_delta).parameters
        kwargs = {name: value for name, value in self.hub_kwargs.items() if name in known and value is not None}
        return fetch_delta(self.path_or_repo, **kwargs).folder


def loading_in_progress() -> Loading | None:
    """What the stock way of loading that called the tuner was asked for; `None` where an adapter is made anew."""
    for frame in callers():
        read = _CALLERS.get(frame.f_code)
        if read is not None:
            return read(frame.f_locals)
    return None


def _of_peft(arguments: Mapping[str, Any]) -> Loading:
    return Loading(os.fspath(arguments["model_id"]), arguments.get("hf_hub_download_kwargs") or arguments["kwargs"])


def _of_transformers(arguments: Mapping[str, Any]) -> Loading:
    tensors = arguments["adapter_state_dict"]
    path = arguments["peft_model_id"]
    return Loading(None if path is None else os.fspath(path), arguments["load_config"].download_kwargs, tensors)


def _code(function: Any) -> CodeType:
    return inspect.unwrap(getattr(function, "__func__", function)).__code__


_CALLERS: dict[CodeType, Callable[[Mapping[str, Any]], Loading]] = {
    _code(PeftModel.from_pretrained): _of_peft,
    _code(PeftModel.load_adapter): _of_peft,
    _code(PeftAdapterMixin.load_adapter): _of_transformers,
}
