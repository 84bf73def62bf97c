"""What a tuned task costs beside the base: on disk, to save, to load and to switch to."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from bitfit_hf import BiasDelta, BitFitModel

from .systems import FULL
from .timing import median_seconds

_FILE = "model.safetensors"


def storage_costs(name: str, model: nn.Module, *, times: int = 5) -> dict[str, float | int]:
    """Measures one system.

    A wrapped model saves and loads by its library's own functions, BitFit by [`BiasDelta`]; a stock model by the
    tensors that were trained, which is all that a task needs. Loading goes onto a base that is there already.

    Args:
        name (`str`): The system.
        model (`torch.nn.Module`): As it is trained; left with another adapter.
        times (`int`, *optional*, defaults to 5): Of each action; medians are returned.

    Returns:
        `dict`: `disk_bytes`, `save_seconds`, `load_seconds`, and `switch_seconds`, between two tasks in memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "task"
        place.mkdir()
        save = _saving(name, model, place)
        save_seconds = median_seconds(save, times)
        disk = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        return {
            "disk_bytes": disk,
            "save_seconds": save_seconds,
            "load_seconds": _time_loading(model, place, times),
            "switch_seconds": median_seconds(_switching(model, place), 4 * times),
        }


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _saving(name: str, model: nn.Module, place: Path) -> Callable[[], object]:
    if isinstance(model, PeftModel):
        return lambda: model.save_pretrained(str(place))
    if name == FULL:
        return lambda: model.save_pretrained(str(place))  # type: ignore[operator]
    return lambda: save_file(_trained(model), place / _FILE)


def _time_loading(model: nn.Module, place: Path, times: int) -> float:
    if isinstance(model, PeftModel) and isinstance(model.base_model, BitFitModel):
        base = copy.deepcopy(model).unload()
        applied = []

        def apply() -> None:
            applied.append(BiasDelta.from_pretrained(str(place)))
            applied[-1].apply_(base)

        return median_seconds(apply, times, undo=lambda: applied.pop().remove_(base))
    if isinstance(model, PeftModel):
        return median_seconds(
            lambda: model.load_adapter(str(place), adapter_name="loaded"),
            times,
            undo=lambda: model.delete_adapter("loaded"),
        )
    return median_seconds(lambda: model.load_state_dict(load_file(place / _FILE), strict=False), times)


def _switching(model: nn.Module, place: Path) -> Callable[[], object]:
    if isinstance(model, PeftModel):
        model.load_adapter(str(place), adapter_name="other")
        names = cycle(["other", "default"])
        return lambda: model.set_adapter(next(names))
    live = dict(model.named_parameters())
    tasks = cycle([{name: tensor.clone() for name, tensor in _trained(model).items()} for _ in range(2)])

    @torch.no_grad()
    def write() -> None:
        for name, tensor in next(tasks).items():
            live[name].copy_(tensor)

    return write
