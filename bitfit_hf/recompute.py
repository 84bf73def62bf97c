"""Memory: the activations of the MLP are computed again in the backward pass instead of being kept.

With frozen weights a Linear keeps no input for the backward pass. What is kept then is, above all, the input of the
MLP's activation, the widest tensor of a layer: 144 of 364 MiB for BERT-base, batch 8 x 128, without dropout. It can be
computed again, equal to the last bit, for the price of one matrix product: the norm's input is kept in any case, the
norm gives the MLP's input, and the MLP's first projection gives the activation's. `torch.utils.checkpoint` does the
recomputing and takes care of dropout, autocast and devices. This module finds the parts of a model where it pays, the
*regions*, and lets the checkpoint start from the norm's input, though the norm lies in another module.

A region begins with the MLP's first projection and ends before its last one, which is never run again:

* Where a module holds nothing but the MLP, or its first half (`BertIntermediate`, `GPT2MLP`, `LlamaMLP`), that
  module's forward runs under the checkpoint. The product in a gated MLP, which keeps two more wide tensors, lies
  inside.
* Where a layer owns the projections itself (BART, OPT, ALBERT), the activation function alone is the region.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

from .errors import RecomputationError, UnsupportedLayerError
from .terms import find_biases
from .terms.structure import LINEAR, NORM, kind_of, stock_root, walk
from .tuner.layer import BitFitLayer
from .tuner.reading import owners

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=nn.Module)

_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")  # where their classes are defined


def recompute_activations(model: _Model, enabled: bool = True) -> _Model:
    """Lets a model compute the activations of its MLPs again in the backward pass instead of keeping them.

    Outputs and gradients are those of the ordinary path, with the same dropout masks; a step takes one more
    matrix product in each layer, a sixth to a fifth longer at BERT-base shape. It takes effect where gradients are
    recorded, not under `torch.no_grad()` and not in a model compiled with `torch.compile`, whose partitioner chooses
    by itself what to keep. Gradient checkpointing computes whole layers again, so there is no point in both.

    Args:
        model (`torch.nn.Module`):
            A transformer with adapters injected, a `PeftModel`, or a stock model with frozen weights. Changed in
            place, but neither its parameters nor what it saves. Calling this twice is the same as once.
        enabled (`bool`, *optional*, defaults to `True`): `False` gives the model its ordinary path back.

    Returns:
        `torch.nn.Module`: `model`.

    Raises:
        [`UnsupportedLayerError`]: No MLP was found in the model.

    Example:

    ```python
    >>> model = recompute_activations(get_peft_model(base, BitFitConfig()))
    >>> model(**batch).loss.backward()
    ```
    """
    _uninstall(model)
    if not enabled:
        return model
    root = stock_root(model)
    if any(getattr(module, "gradient_checkpointing", False) for module in root.modules()):
        logger.warning(
            "%s has gradient checkpointing on, which computes whole layers again: `recompute_activations` would only "
            "add to its price, and was left out.",
            type(root).__name__,
        )
        return model
    prepared = _PreparedModules.of(root)
    if not prepared.regions:
        raise UnsupportedLayerError(
            f"`recompute_activations` found no MLP in {type(root).__name__}: no module that holds the projections of "
            "the terms `intermediate` and `output` alone, and none of these with an activation module beside it. "
            "`bitfit inspect` lists the terms of a model. Leave the option out, or use gradient checkpointing."
        )
    prepared.install()
    logger.info("The activations of %d MLPs are computed again in the backward pass.", len(prepared.regions))
    return model


def recomputed_regions(model: nn.Module) -> list[str]:
    """Stock paths of the modules whose activations are computed again; empty where that is off."""
    return [path for path, module in walk(stock_root(model)) if hasattr(module, "_bitfit_region")]


# --- finding the regions ---------------------------------------------------------------------------------------------


@dataclass
class _PreparedModules:
    """The modules of a live model that are prepared for recomputing (the wrapper, where a layer is wrapped).

    Args:
        norms (`list[nn.Module]`): Norms of the layers, whose output may feed an MLP.
        regions (`dict[nn.Module, bool]`): Module to run under a checkpoint -> whether it is an activation alone.
        entries (`list[nn.Module]`): First projections of the MLPs whose region is the activation alone.
        exits (`list[nn.Module]`): Last projections that lie in a region's module.
    """

    norms: list[nn.Module]
    regions: dict[nn.Module, bool]
    entries: list[nn.Module]
    exits: list[nn.Module]

    @classmethod
    def of(cls, root: nn.Module) -> _PreparedModules:
        """Finds them by the bias terms of `root`, whether or not it has the biases."""
        modules = dict(walk(root))
        paths: dict[str, dict[str, None]] = {"first": {}, "last": {}, "norm": {}}
        for bias in find_biases(root, add_missing_biases=True):
            for path in bias.modules:
                kind = kind_of(modules[path])
                if kind == NORM and bias.term in ("attention_layernorm", "output_layernorm"):
                    paths["norm"][path] = None
                elif kind == LINEAR and bias.term in ("intermediate", "output"):
                    paths["first" if bias.term == "intermediate" else "last"][path] = None

        def live(path: str) -> nn.Module:
            parent, _, name = path.rpartition(".")
            return modules[parent]._modules[name]  # type: ignore[return-value]

        prepared = cls([live(path) for path in paths["norm"]], {}, [], [])
        known = {path for found in paths.values() for path in found}
        for parent in dict.fromkeys(path.rpartition(".")[0] for path in paths["first"]):
            below = [path for path in modules if path.startswith(f"{parent}.")]
            if all(path in known or not modules[path]._parameters for path in below):
                prepared.regions[modules[parent]] = False
                prepared.exits += [live(path) for path in below if path in paths["last"]]
                continue
            activations = [child for child in modules[parent]._modules.values() if _is_activation(child)]
            if len(activations) == 1 and activations[0] is not None:
                prepared.regions[activations[0]] = True
                prepared.entries += [live(path) for path in paths["first"] if path.rpartition(".")[0] == parent]
        return prepared

    def install(self) -> None:
        """Prepares the modules."""
        for norm in self.norms:
            norm.register_forward_hook(_remember_norm)
        for entry in self.entries:
            entry.register_forward_hook(_remember_projection)
        for last in self.exits:
            last.register_forward_pre_hook(_leave_region)
        for region, only_if_remembered in self.regions.items():
            if not hasattr(region, "_bitfit_region"):
                region._bitfit_region = only_if_remembered  # type: ignore[assignment]
                region.__class__ = _region_class(type(region))


def _is_activation(module: nn.Module | None) -> bool:
    return (
        module is not None
        and type(module).__module__ in _ACTIVATIONS
        and not module._parameters
        and not module._modules
    )


def _uninstall(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
                del hooks[key]  # type: ignore[attr-defined]
        if "_bitfit_region" in vars(module):
            del module._bitfit_region
            module.__class__ = type(module)._bitfit_plain_class  # type: ignore[assignment, attr-defined]


# --- the class of a region -------------------------------------------------------------------------------------------

# A class of its own, and not a function in the instance's `forward`, survives `copy.deepcopy` and pickling.

_region_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _region_class(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _region_classes:
        body = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": _reduce,
            "_bitfit_plain_class": cls,
            "forward": _forward,
        }
        _region_classes.setdefault(cls, type(cls.__name__, (cls,), body))
    return _region_classes[cls]


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    return _rebuild, (type(module)._bitfit_plain_class,), module.__dict__  # type: ignore[attr-defined]


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    region = _region_class(cls)
    return region.__new__(region)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(self)._bitfit_plain_class.forward, self)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not args:
        return forward(*args, **kwargs)
    origin = _origin_of(args[0])
    if origin is None and (self._bitfit_region or not isinstance(args[0], torch.Tensor)):
        return forward(*args, **kwargs)
    if origin is None:
        origin = _Origin((), args[0], args[0]._version, args[0]._version)
    if any(layer.in_mixed_batch for layer in _tuned(*origin.modules, self)):
        return forward(*args, **kwargs)  # a mixed batch will be over when the backward pass comes
    return _run_region(self, forward, origin, args, kwargs)


# --- where a tensor comes from ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Origin:
    """How a tensor was made.

    Args:
        modules (`tuple[nn.Module, ...]`): By these, one after the other.
        root (`torch.Tensor` or `TensorWeakRef`):
            From this. A norm's input is referred to weakly: if nothing else keeps it, keeping the output is no worse.
        root_version (`int`): Of `root`, when the tensor was made from it.
        version (`int`): Of the tensor, when it was made.
    """

    modules: tuple[nn.Module, ...]
    root: torch.Tensor | TensorWeakRef
    root_version: int
    version: int

    def tensor(self) -> torch.Tensor | None:
        """The root, if it still is there and unchanged."""
        root = self.root if isinstance(self.root, torch.Tensor) else self.root()
        return root if root is not None and root._version == self.root_version else None


def _origin_of(tensor: Any) -> _Origin | None:
    origin: _Origin | None = getattr(tensor, "_bitfit_origin", None)
    if origin is None or origin.version != tensor._version or origin.tensor() is None:
        return None
    return origin


def _remember_norm(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if _traceable(args, output):
        root = TensorWeakRef(args[0])
        output._bitfit_origin = _Origin((module,), root, args[0]._version, output._version)


def _remember_projection(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if _traceable(args, output):
        before = _origin_of(args[0]) or _Origin((), args[0], args[0]._version, args[0]._version)
        modules = (*before.modules, module)
        output._bitfit_origin = _Origin(modules, before.root, before.root_version, output._version)


def _traceable(args: tuple[Any, ...], output: Any) -> bool:
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and len(args) == 1
        and all(isinstance(tensor, torch.Tensor) and not tensor.is_inference() for tensor in (*args, output))
    )


# --- running a region ------------------------------------------------------------------------------------------------


class _Running(threading.local):
    """The regions that this thread is in, innermost last, by what is to be left at the last projection."""

    def __init__(self) -> None:
        self.stacks: list[ExitStack] = []


_running = _Running()


def _leave_region(module: nn.Module, args: tuple[Any, ...]) -> None:
    # From here on tensors are kept as usual: hooks that do nothing hide those of the checkpoint, which would otherwise
    # run the last projection again for the sake of the dropout behind it.
    if _running.stacks:
        _running.stacks[-1].enter_context(torch.autograd.graph.saved_tensors_hooks(_itself, _itself))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_HOOKS: tuple[Callable[..., Any], ...] = (_remember_norm, _remember_projection, _leave_region)


def _run_region(
    module: nn.Module, forward: Callable[..., Any], origin: _Origin, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    first = [args[0]]  # emptied by the forward pass, so that it is not kept for the backward pass
    requires_grad = args[0].requires_grad
    state = _State((*origin.modules, module))

    def run(root: torch.Tensor, *others: Any) -> Any:
        with ExitStack() as stack:
            if first:
                value = first.pop()
            else:
                stack.enter_context(state.restored())
                value = root
                with torch.no_grad():  # the gradient of the region's input is taken where that was made
                    for maker in origin.modules:
                        value = maker(value)
                if origin.modules:
                    value = value.detach().requires_grad_(requires_grad)
            stack.callback(_running.stacks.remove, stack)
            _running.stacks.append(stack)
            return forward(value, *others, **kwargs)

    return checkpoint(run, origin.tensor(), *args[1:], use_reentrant=False)


class _State:
    """What a region's result depends on beside its input, as it is at present.

    Args:
        modules (`Sequence[nn.Module]`): The region's, and those that make its input.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._layers = [
            (layer, tuple(layer.adapters_in_use), list(layer.merged_adapters)) for layer in _tuned(*modules)
        ]
        self._trained = [(p, p._version) for module in modules for p in module.parameters() if p.requires_grad]

    def restored(self) -> ExitStack:
        """Lets the region compute with the adapters that were in use.

        Raises:
            [`RecomputationError`]: What they hold is no longer there.
        """
        if any(parameter._version != version for parameter, version in self._trained) or any(
            layer.merged_adapters != merged for layer, _, merged in self._layers
        ):
            raise RecomputationError(
                "The deltas were changed between a forward pass and its backward pass (an optimizer step, a delta "
                "loaded or merged), and `recompute_activations` needs them as they were. Run `backward()` first, or "
                "give the model its ordinary path back: `recompute_activations(model, enabled=False)`."
            )
        stack = ExitStack()
        for layer, names, _ in self._layers:
            if tuple(layer.adapters_in_use) != names:
                stack.enter_context(layer.using(*names))
        return stack


def _tuned(*modules: nn.Module) -> Iterator[BitFitLayer]:
    """The BitFit layers among `modules` and in them, or around them."""
    for module in modules:
        yield from (owner for owner in dict.fromkeys(owners(module).values()) if isinstance(owner, BitFitLayer))
        for inner in module.modules():
            if isinstance(inner, BitFitLayer):
                yield inner
