"""Training, saving and loading a few scalars of large tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from bitfit_hf.storage.files import read_tensors

from .base import Folder, copy_tensors, head_tensors, save_tensors

_FILE = "sparse.safetensors"
_INDICES, _VALUES, _HEAD = "indices.", "values.", "head."

_Kind = TypeVar("_Kind", bound=nn.Module)


class SparseValues(nn.Module):
    """
    A parametrization that puts trainable values in some places of a frozen tensor.

    The values are parameters of their own, so optimizer, clipping and DDP see them and nothing else, and whatever the
    optimizer does, the other scalars of the tensor keep their bits.

    Args:
        tensor (`torch.Tensor`): The pre-trained one.
        indices (`torch.Tensor`): Where, in the flattened tensor; integers without repetition.
    """

    indices: torch.Tensor

    def __init__(self, tensor: torch.Tensor, indices: torch.Tensor) -> None:
        super().__init__()
        indices = indices.to(tensor.device)
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(tensor.detach().flatten()[indices].float())

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten().scatter(0, self.indices, self.values.to(tensor.dtype)).view_as(tensor)


def parametrize_(model: nn.Module, parametrizations: Mapping[str, nn.Module]) -> None:
    """Registers parametrizations for parameters of a stock model; a tied one everywhere it is used.

    Args:
        model (`torch.nn.Module`): Changed in place.
        parametrizations (`Mapping[str, torch.nn.Module]`): By name of the parameter.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    for name, parametrization in parametrizations.items():
        for module, attribute in places[id(model.get_parameter(name))]:
            # Unsafe only means that shapes and dtypes are not tried out, which would form every tensor once.
            parametrize.register_parametrization(module, attribute, parametrization, unsafe=True)


def parametrizations(model: nn.Module, kind: type[_Kind]) -> Iterator[tuple[str, nn.Parameter, _Kind]]:
    """Yields `(stock name, frozen tensor, parametrization)` for the parametrizations of a `kind`, a tied one once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in module.parametrizations.items():
            if isinstance(chain[0], kind) and id(chain[0]) not in seen:
                seen.add(id(chain[0]))
                yield f"{path}.{attribute}" if path else attribute, chain.original, chain[0]


def save_sparse(values: Mapping[str, tuple[torch.Tensor, torch.Tensor]], model: nn.Module, folder: Folder) -> int:
    """Writes scalars of tensors and the task head into one safetensors file.

    Args:
        values (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`):
            By name of the parameter: flat indices, stored in 32 bits where they fit, and what stands there.
        model (`torch.nn.Module`): Whose head is saved.
        folder (`str` or `os.PathLike`): Where to.

    Returns:
        `int`: The file's size in bytes.
    """
    tensors = {f"{_HEAD}{name}": tensor for name, tensor in head_tensors(model).items()}
    for name, (indices, scalars) in values.items():
        small = indices.numel() == 0 or int(indices.max()) < 2**31
        tensors[f"{_INDICES}{name}"] = indices.to(torch.int32 if small else torch.int64)
        tensors[f"{_VALUES}{name}"] = scalars
    return save_tensors(tensors, folder, _FILE)


def load_sparse(model: nn.Module, folder: Folder) -> None:
    """Writes what [`save_sparse`] saved into a stock model.

    Raises:
        `ValueError`: It does not fit.
    """
    where = Path(folder) / _FILE
    saved = read_tensors(where)
    parameters = dict(model.named_parameters())
    for key in [key for key in saved if key.startswith(_INDICES)]:
        name = key.removeprefix(_INDICES)
        indices, scalars = saved[key].long(), saved[f"{_VALUES}{name}"]
        if name not in parameters or indices.max() >= parameters[name].numel():
            raise ValueError(f"{where} does not fit the model: {name}. Load it onto the base it was trained on.")
        with torch.no_grad():
            flat = parameters[name].view(-1)
            flat[indices.to(flat.device)] = scalars.to(flat)
    head = {key.removeprefix(_HEAD): tensor for key, tensor in saved.items() if key.startswith(_HEAD)}
    copy_tensors(head_tensors(model), head, where=str(where))
