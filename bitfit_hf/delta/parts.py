"""What a delta is made of, and whether its tensors are those that its configuration describes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..config import BitFitConfig
from ..errors import DeltaFormatError, collect
from ..storage.files import check_values
from ..terms import Bias, part_of


@dataclass(frozen=True, eq=False)
class DeltaParts:
    """
    The parts of a [`BiasDelta`], as what extracts and calculates hands them on.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): The deltas by stock name.
        config ([`BitFitConfig`]): What they are.
        head (`Mapping[str, torch.Tensor]`): Parameters of the head by stock name.
        added (`Mapping[str, torch.Tensor]`): Rows of added tokens.
        error (`float`, *optional*): The largest error of extracting.
    """

    tensors: Mapping[str, torch.Tensor]
    config: BitFitConfig
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    error: float | None = None


def grouped(biases: Iterable[Bias]) -> dict[str, list[Bias]]:
    """Biases by the vector that they live in: a fused one holds several terms."""
    groups: dict[str, list[Bias]] = {}
    for bias in biases:
        groups.setdefault(bias.name, []).append(bias)
    return groups


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    head: Mapping[str, torch.Tensor],
    biases: Mapping[str, list[Bias]],
    leaves: list[str],
    where: str,
) -> None:
    """Raises [`DeltaFormatError`] where deltas and head are not those that the configuration describes.

    Args:
        tensors (`Mapping[str, torch.Tensor]`), head (`Mapping[str, torch.Tensor]`): By stock name.
        biases (`Mapping[str, list[Bias]]`): What is tuned, see [`grouped`].
        leaves (`list[str]`): What is trained whole.
        where (`str`): Names the delta.
    """
    problems = [f"{name} is missing" for name in biases if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in biases]
    for name, group in biases.items():
        size = sum(bias.num_parameters for bias in group)
        wanted = group[0].shape if size == math.prod(group[0].shape) else (size,)
        if name in tensors and tuple(tensors[name].shape) != wanted:
            problems.append(f"{name} has shape {list(tensors[name].shape)} instead of {list(wanted)}")
    owners = {name: part_of(name, leaves) for name in head}
    problems += [f"{name} is not expected" for name, owner in owners.items() if owner is None]
    problems += [f"the head's {leaf} is missing" for leaf in leaves if leaf not in owners.values()]
    if problems:
        raise DeltaFormatError(
            f"{where}: the tensors are not those that adapter_config.json describes:{collect(problems)}\n"
            "Save or fetch the delta again."
        )
    check_values({**tensors, **head}, where=where)


def check_added(added: Mapping[str, torch.Tensor], count: int, where: str) -> None:
    """Raises [`DeltaFormatError`] where the rows of added tokens are not those that the configuration counts."""
    problems = [
        f"{name} has {len(tensor)} rows"
        for name, tensor in added.items()
        if tensor.dim() not in (1, 2) or len(tensor) != count
    ]
    if bool(count) != any(tensor.dim() == 2 for tensor in added.values()):
        problems.append(f"there are {len(added)} tensors of added tokens")
    if problems:
        raise DeltaFormatError(
            f"{where}: adapter_config.json counts {count} added tokens:{collect(problems)}\n"
            "Save or fetch the delta again."
        )
    check_values(dict(added), where=where)
