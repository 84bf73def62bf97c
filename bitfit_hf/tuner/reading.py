"""How a layer comes to compute with `b_0 + δ`: by what it reads as its bias.

A tuned layer keeps its own code and its own stored parameters. Only its class gains a property of the bias's name
(`bias`, `q_bias`, `in_proj_bias`, …), so whoever reads the bias, the layer's own forward or other code, gets the
effective one: the delta goes into the layer's own operation, with no pass over the activations, for every kind of
layer alike. The parameter stays in `_parameters`, so `state_dict`, `named_parameters` and `.to` see the stock layer,
and nothing is ever swapped or written while the model runs, which makes reading safe for several threads.
`torch.nn.utils.parametrize` works the same way but renames the parameter.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ..backends.sharded import is_flattened


class BiasOwner(Protocol):
    """What holds the deltas of a layer, or an adapter's own values of a parameter."""

    def effective_bias(self, parameter: str, base: torch.Tensor | None) -> torch.Tensor | None: ...


def install(layer: nn.Module, parameters: tuple[str, ...], owner: BiasOwner) -> None:
    """Makes `layer` read the parameters named `parameters` through `owner`."""
    # A dict hides the owners, themselves modules that hold `layer`, from `nn.Module`'s registration of children.
    _set_owners(layer, {**owners(layer), **dict.fromkeys(parameters, owner)})


def uninstall(layer: nn.Module, parameters: tuple[str, ...]) -> None:
    """Undoes [`install`]; with nothing left to read through an owner, `layer` has its stock class again."""
    _set_owners(layer, {name: owner for name, owner in owners(layer).items() if name not in parameters})


def owners(layer: nn.Module) -> dict[str, Any]:
    """Whom `layer` reads its parameters through, by their names."""
    return vars(layer).get("_bitfit_owners", {})


def _set_owners(layer: nn.Module, owners: dict[str, BiasOwner]) -> None:
    if owners:
        object.__setattr__(layer, "_bitfit_owners", owners)
        layer.__class__ = _reading_class(stock_class(layer), tuple(owners))
    else:
        layer.__dict__.pop("_bitfit_owners", None)
        layer.__class__ = stock_class(layer)


def stock_class(layer: nn.Module) -> type[nn.Module]:
    """The class of `layer` as its model defines it."""
    return getattr(type(layer), "_bitfit_stock_class", type(layer))


_reading_classes: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _reading_class(cls: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    if (cls, parameters) not in _reading_classes:
        _reading_classes.setdefault((cls, parameters), _make_reading_class(cls, parameters))
    return _reading_classes[cls, parameters]


def _make_reading_class(cls: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    # Under the stock name, since some libraries look at the name of a layer's class.
    body: dict[str, Any] = {name: _reading_property(name) for name in parameters}
    body |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_bitfit_stock_class": cls,
        "_bitfit_parameters": parameters,
    }
    return type(cls.__name__, (cls,), body)


def _reading_property(name: str) -> property:
    # Parameters are set and deleted by `nn.Module` and never come here. FSDP1 deletes the parameter, and while the
    # layer computes it puts a view of its flat buffer in its place.

    def read(layer: Any) -> torch.Tensor | None:
        attributes = layer.__dict__
        parameters = attributes["_parameters"]
        if name in parameters:
            stored = parameters[name]
        elif name in attributes:
            stored = attributes[name]
        else:
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}")
        if stored is not None and "_fsdp_use_orig_params" in attributes and is_flattened(stored):
            return stored  # it is FSDP1 that looks, and would write anything else into its buffer
        return attributes["_bitfit_owners"][name].effective_bias(name, stored)

    def write(layer: Any, value: torch.Tensor | None) -> None:
        layer.__dict__[name] = value  # where `nn.Module` takes it out again when a parameter comes back

    def delete(layer: Any) -> None:
        if name not in layer.__dict__:
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}")
        del layer.__dict__[name]

    return property(read, write, delete)


def _reduce(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    # The class is made at run time, so pickle and deepcopy need its recipe.
    return _rebuild, (stock_class(layer), type(layer)._bitfit_parameters), layer.__dict__  # type: ignore[attr-defined]


def _rebuild(cls: type[nn.Module], parameters: tuple[str, ...]) -> nn.Module:
    reading = _reading_class(cls, parameters)
    return reading.__new__(reading)
