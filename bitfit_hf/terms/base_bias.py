"""What `b_0` of a layer is, and how `b_0 + δ` is formed: one place for adapters, merging and applied deltas.

`b_0 + δ − δ` is not `b_0` in floating point. So whoever writes over a stored bias does it with [`write_over`], which
keeps `b_0` beside the layer until [`put_back`]. What was written is kept too: the user may load another state dict in
between, and then the biases that are there are the base's own.

A stored bias may have more entries than `b_0`: an output layer with room for added tokens has theirs behind those of
the base. What is written, kept and compared here are the first ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum

import torch
from torch import nn

from ..backends.sharded import is_sharded

# In a layer's `__dict__`: for each parameter `b_0` and what was written over it. A plain dict of tensors, so that a
# model that is pickled whole can be read without this library.
_KEPT = "_bitfit_kept"


class Found(Enum):
    """What is in the place of a bias that was written over."""

    WRITTEN = "what was written"
    BASE = "b_0"
    OTHER = "something else"


def base_bias(layer: nn.Module, parameter: str) -> torch.Tensor | None:
    """`b_0` of a stock layer: what it stores, or what was there before this library wrote over it.

    Args:
        layer (`nn.Module`): A stock layer, perhaps inside a [`BitFitLayer`].
        parameter (`str`): Name of the bias in it.

    Returns:
        `torch.Tensor`, or `None` where the base has no such bias.
    """
    return _kept(layer)[parameter][0] if found(layer, parameter) is Found.WRITTEN else layer._parameters.get(parameter)


def kept_bias(layer: nn.Module, parameter: str) -> torch.Tensor | None:
    """As [`base_bias`], without a look at what is stored: for forward passes, where comparing would cost too much."""
    kept = _kept(layer)
    return kept[parameter][0] if parameter in kept else layer._parameters.get(parameter)


def found(layer: nn.Module, parameter: str) -> Found | None:
    """Compares what was written over a bias with what is there now; `None` where nothing was written.

    Where the two are equal in the precision at hand, and `b_0` is too, the answer is [`Found.WRITTEN`].
    """
    if parameter not in _kept(layer):
        return None
    base, written = _kept(layer)[parameter]
    stored = layer._parameters.get(parameter)
    if stored is None:
        return Found.BASE if base is None else Found.OTHER
    if stored.is_meta or is_sharded(stored):
        return Found.WRITTEN  # the values are not at hand
    # Models are cast, and some layers cast their bias: either may have gone by way of a lower precision.
    for way in (None, torch.bfloat16, torch.float16):
        if _same(stored, written, way):
            return Found.WRITTEN
        if base is not None and _same(stored, base, way):
            return Found.BASE
    return Found.OTHER


def tells(layer: nn.Module, parameter: str) -> bool:
    """Whether what was written over a bias differs from `b_0` in what the layer can store."""
    base, written = _kept(layer)[parameter]
    stored = layer._parameters.get(parameter)
    if base is None or stored is None:
        return True
    return not _same(base.to(written.device, stored.dtype), written)


def write_over(layer: nn.Module, parameter: str, value: torch.Tensor) -> None:
    """Writes `value` over a stored bias, of which `b_0` is kept; gives the layer one where it has none.

    Args:
        layer (`nn.Module`): A stock layer.
        parameter (`str`): Name of the bias in it.
        value (`torch.Tensor`): `b_0 + δ`; of a bias with more entries than `b_0`, for the first ones.
    """
    stored = layer._parameters.get(parameter)
    base = base_bias(layer, parameter)
    if base is not None and base is stored:
        base = _first(stored, value).detach().clone()
    if stored is None:
        stored = layer._parameters[parameter] = nn.Parameter(value.detach().clone(), requires_grad=False)
    else:
        _write(stored, value)
    layer.__dict__.setdefault(_KEPT, {})[parameter] = (base, value.detach().to(stored.dtype, copy=True))


def put_back(layer: nn.Module, parameter: str) -> None:
    """Puts `b_0` back where [`write_over`] has written, bit for bit."""
    if parameter not in _kept(layer):
        return
    base, _ = _kept(layer)[parameter]
    stored = layer._parameters.get(parameter)
    if base is None:
        layer._parameters[parameter] = None
    elif stored is None:
        layer._parameters[parameter] = nn.Parameter(base, requires_grad=False)
    else:
        _write(stored, base)
    forget(layer, parameter)


def forget(layer: nn.Module, parameter: str) -> None:
    """Makes what a layer stores its own: what was kept is dropped, and nothing is written."""
    _kept(layer).pop(parameter, None)
    if not _kept(layer):
        layer.__dict__.pop(_KEPT, None)


def overwritten(layers: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of the biases in a model's `layers` that are not the base's own, since something was written over them."""
    for path, layer in layers.items():
        for parameter in _kept(layer):
            if found(layer, parameter) is Found.WRITTEN and tells(layer, parameter):
                yield f"{path}.{parameter}" if path else parameter


def add_deltas(
    base: torch.Tensor | None,
    deltas: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    *,
    dtype: torch.dtype,
    shape: Sequence[int] = (),
) -> torch.Tensor:
    """`b_0 + Σ δ`, formed in float32 or finer and cast once.

    Args:
        base (`torch.Tensor`, *optional*): `b_0`; a bias that the base does not have counts as zero.
        deltas (`Iterable`):
            At least one `δ`, each with the positions in the flattened bias where it belongs, or `None` if it covers
            all of it.
        dtype (`torch.dtype`): Of the result.
        shape (`Sequence[int]`, *optional*): Of the bias; needed where there is no `base`, and slices are added.
    """
    # Runs for every layer in every forward pass: casts that change nothing are not called.
    total = base
    if base is not None and base.dtype != torch.float32:
        total = base.to(torch.promote_types(base.dtype, torch.float32))
    for delta, index in deltas:
        if index is not None:
            if total is None:
                total = torch.zeros(tuple(shape), dtype=torch.float32, device=delta.device)
            total = total.flatten().index_add(0, index, delta.to(total.dtype)).view_as(total)
        else:
            total = delta if total is None else total + delta
    assert total is not None  # there is at least one delta
    return total if total.dtype == dtype else total.to(dtype)


@torch.no_grad()
def _write(stored: torch.Tensor, value: torch.Tensor) -> None:
    # Not by way of `.data`: torch counts this write, and so whoever shares the weights notices it, a `TaskBank` first.
    _first(stored, value).copy_(value)


def _kept(layer: nn.Module) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
    return vars(layer).get(_KEPT, {})


def _first(stored: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The entries of a stored bias that `value` is for."""
    return stored if stored.dim() != 1 or value.dim() != 1 else stored[: len(value)]


def _same(stored: torch.Tensor, value: torch.Tensor, way: torch.dtype | None = None) -> bool:
    stored = _first(stored, value)
    if stored.shape != value.shape:
        return False
    value = value.to(stored.device)
    return torch.equal(stored, (value if way is None else value.to(way)).to(stored.dtype))
