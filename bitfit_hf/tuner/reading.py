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


class BiasOwner(Protocol):
    """What holds the deltas of a layer."""

    def effective_bias(self, parameter: str, base: torch.Tensor | None) -> torch.Tensor | None: ...


def install(layer: nn.Module, parameters: tuple[str, ...], owner: BiasOwner) -> None:
    """Makes `layer` read the biases named `parameters` through `owner`."""
    # A tuple hides the owner, itself a module that holds `layer`, from `nn.Module`'s registration of children.
    object.__setattr__(layer, "_bitfit_owner", (owner,))
    layer.__class__ = _reading_class(stock_class(layer), parameters)


def uninstall(layer: nn.Module) -> None:
    """Gives `layer` its stock class back."""
    layer.__class__ = stock_class(layer)
    layer.__dict__.pop("_bitfit_owner", None)


def owner_of(layer: nn.Module) -> BiasOwner | None:
    """What holds the deltas of a layer; `None` for a layer that is not tuned."""
    return vars(layer).get("_bitfit_owner", (None,))[0]


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
    def read(layer: Any) -> torch.Tensor | None:
        stored = layer._parameters[name] if name in layer._parameters else layer.__dict__.get(f"_{name}_view")
        return layer._bitfit_owner[0].effective_bias(name, stored)

    def write(layer: Any, value: torch.Tensor | None) -> None:
        # Parameters never come here, `nn.Module.__setattr__` files them. FSDP1 takes the parameter out and puts a
        # view of its flat buffer in its place.
        layer.__dict__[f"_{name}_view"] = value

    return property(read, write)


def _reduce(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    # The class is made at run time, so pickle and deepcopy need its recipe.
    return _rebuild, (stock_class(layer), type(layer)._bitfit_parameters), layer.__dict__  # type: ignore[attr-defined]


def _rebuild(cls: type[nn.Module], parameters: tuple[str, ...]) -> nn.Module:
    reading = _reading_class(cls, parameters)
    return reading.__new__(reading)
