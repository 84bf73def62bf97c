"""One pass over a model that finds its bias terms by structure and says where each stands."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import STACKS, TORCH_LAYERS, family_of
from .family import Family, lookup
from .fused import Spans, thirds
from .structure import (
    MULTIHEAD,
    NORM,
    bias_name,
    kind_of,
    missing_bias_size,
    own_bias,
    shape_of,
    stock_module,
    stock_root,
    walk,
)


@dataclass(frozen=True)
class Bias:
    """One bias term in one place of a model.

    Args:
        module (`str`): Stock path of the owning module, such as `"bert.encoder.layer.0.attention.self.query"`.
        parameter (`str`): Name of the vector in its module: `"bias"`, `"in_proj_bias"`, `"q_bias"`, ...
        term (`str`): One of `TERMS`.
        layer (`int`, *optional*): Running index of the transformer layer in its stack, `None` outside the layers.
        stack (`str`): `""` in a model with one stack, else `"encoder"`, `"decoder"`, `"text"`, `"vision"`, ...
        shape (`tuple[int, ...]`): Shape of the whole parameter.
        spans (`tuple[tuple[int, int], ...]`):
            Index ranges of the flattened parameter that belong to the term: one range, except in fused projections.
        exists (`bool`, *optional*, defaults to `True`): `False` if the module has no bias yet.
        aliases (`tuple[str, ...]`, *optional*): Names of other places that use the same tied parameter.
    """

    module: str
    parameter: str
    term: str
    layer: int | None
    stack: str
    shape: tuple[int, ...]
    spans: Spans
    exists: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The parameter's name in the stock model."""
        return _join(self.module, self.parameter)

    @property
    def modules(self) -> list[str]:
        """Paths of all the modules that use it: one, and more where it is tied."""
        return [self.module, *(alias.rpartition(".")[0] for alias in self.aliases)]

    @property
    def num_parameters(self) -> int:
        """How many scalars belong to the term here."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True)
class Found:
    """A bias and the kind of its module, `None` for a free-standing vector."""

    bias: Bias
    kind: str | None


@dataclass
class Survey:
    """What one pass over a model found.

    Args:
        root (`torch.nn.Module`): The stock model.
        modules (`dict[str, torch.nn.Module]`): Stock path -> stock module.
        found (`list[Found]`): Every bias, existing or possible, in model order.
        num_layers (`int`): Number of layers of the deepest stack.
        unknown (`list[str]`): Names of the 1-D parameters that are neither a bias nor the weight of a norm.
    """

    root: nn.Module
    modules: dict[str, nn.Module] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    num_layers: int = 0
    unknown: list[str] = field(default_factory=list)


def survey_model(model: nn.Module) -> Survey:
    """Finds every bias of `model`, the head's included."""
    survey = Survey(stock_root(model))
    places = dict(_places(survey.root))
    survey.modules = {path: place.module for path, place in places.items()}

    numbers = _number_layers(places.values())
    survey.num_layers = 1 + max(numbers.values(), default=-1)
    several_stacks = len({place.stack for place in places.values() if place.block in numbers}) > 1

    def add(path: str, name: str, shape: tuple[int, ...], terms: Mapping[str, Spans], exists: bool) -> None:
        place = places[path]
        layer = None if place.block is None else numbers.get(place.block)
        stack = place.stack if several_stacks else ""
        survey.found.extend(
            Found(Bias(path, name, term, layer, stack, shape, spans, exists), place.kind)
            for term, spans in terms.items()
        )

    owners: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    seen: set[int] = set()
    for path, place in places.items():
        module, kind = place.module, place.kind
        if kind is None:
            for name, term in place.free_terms().items():
                vector = module._parameters[name]
                if vector is not None and id(vector) not in owners:
                    shape = shape_of(vector)
                    owners[id(vector)] = _join(path, name)
                    add(path, name, shape, {term: ((0, math.prod(shape)),)}, True)
            continue
        name = bias_name(kind)
        bias = own_bias(module, kind)
        if bias is None:
            size = missing_bias_size(module, kind)
            if size and id(module) not in seen:
                add(path, name, (size,), place.terms(size), False)
        elif id(bias) in owners:
            aliases.setdefault(owners[id(bias)], []).append(_join(path, name))
        else:
            owners[id(bias)] = _join(path, name)
            add(path, name, shape_of(bias), place.terms(*shape_of(bias)), True)
        seen.add(id(module))

    survey.found = [
        replace(found, bias=replace(found.bias, aliases=tuple(aliases.get(found.bias.name, ()))))
        for found in survey.found
    ]
    survey.unknown = list(_unknown(places, known=set(owners)))
    return survey


def _unknown(places: Mapping[str, _Place], known: set[int]) -> Iterator[str]:
    for path, place in places.items():
        # Norms with a gate and the like are no known kind, but their weight is no riddle either.
        norm = place.kind == NORM or "Norm" in type(place.module).__name__
        for name, parameter in place.module._parameters.items():
            if parameter is None or len(shape_of(parameter)) != 1 or id(parameter) in known:
                continue
            known.add(id(parameter))
            if not (norm and name == "weight"):
                yield _join(path, name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- where a module stands -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a module stands, which is what names its terms."""

    module: nn.Module
    kind: str | None
    stack: str
    block: str | None  # path of the layer that the module lies in
    inner: str  # path inside that layer, or inside the model
    table: Mapping[str, str]
    context: _Context

    def terms(self, size: int) -> dict[str, Spans]:
        """Which index ranges of the module's bias of `size` elements belong to which term."""
        if self.kind == MULTIHEAD:
            return thirds(size)
        family = self.context.family
        if family is not None and self.block is not None:
            layout = lookup(family.fused, self.inner)
            if layout is not None:
                return layout(size, self.context.config)
        return {self._term(): ((0, size),)}

    def _term(self) -> str:
        if self.context.in_attention:
            return "attention_output"
        if self.module is self.context.output_embeddings:
            return "lm_head"
        if self.block is not None:
            return lookup(self.table, self.inner) or "other"
        return self.context.family.outside_term(self.inner) if self.context.family else "other"

    def free_terms(self) -> dict[str, str]:
        """Name in the module -> term, of the free-standing bias vectors that the module holds."""
        family = self.context.family
        if family is None or not family.free:
            return {}
        found = {
            name: lookup(family.free, _join(self.inner, name), anywhere=self.block is None)
            for name in self.module._parameters
        }
        return {name: term for name, term in found.items() if term is not None}


@dataclass(frozen=True)
class _Context:
    """What a module hands down to those inside it."""

    start: str = ""  # path of the model whose family names the terms
    family: Family | None = None
    config: PretrainedConfig | None = None
    stack: str = ""
    output_embeddings: nn.Module | None = None
    torch_layer: tuple[str, Mapping[str, str]] | None = None
    in_attention: bool = False


def _places(root: nn.Module) -> Iterator[tuple[str, _Place]]:
    contexts: dict[str, _Context] = {}
    for path, module in walk(root):
        context = _enter(path, module, contexts[path.rpartition(".")[0]] if path else _Context())
        contexts[path] = replace(context, in_attention=isinstance(module, nn.MultiheadAttention))
        yield path, _place(path, module, context)


def _enter(path: str, module: nn.Module, context: _Context) -> _Context:
    if isinstance(module, PreTrainedModel):
        family = family_of(module)
        if family is None and context.family is None:
            context = replace(context, output_embeddings=_output_embeddings(module) or context.output_embeddings)
        elif family is not None and family is not context.family:
            stack = _named_stack(_relative(path, context.start), default=context.stack)
            context = _Context(start=path, family=family, config=module.config, stack=stack)
    if context.family is None:
        table = next((table for layer_type, table in TORCH_LAYERS if isinstance(module, layer_type)), None)
        if table is not None:
            return replace(context, torch_layer=(path, table))
    return context


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The LM head of a model without a table."""
    try:
        embeddings = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return stock_module(embeddings) if isinstance(embeddings, nn.Module) else None


_NUMBERED = re.compile(r"((?:.*?\.)??[0-9]+)(?:\.|$)")


def _place(path: str, module: nn.Module, context: _Context) -> _Place:
    inner, stack = _relative(path, context.start), context.stack
    block: str | None = None
    table: Mapping[str, str] = {}
    if context.family is not None:
        own_stack = context.family.stack(inner)
        if own_stack and own_stack != stack:
            stack = _join(stack, own_stack)
        split = context.family.split(inner)
        if split is not None:
            block, inner, table = split
            block = _join(context.start, block)
    elif context.torch_layer is not None:
        block, table = context.torch_layer
        inner, stack = _relative(path, block), _stack_without_family(block)
    else:
        match = _NUMBERED.match(path)
        stack = _named_stack(path)
        if match:
            block, inner = match.group(1), _relative(path, match.group(1))
            stack = _stack_without_family(match.group(1))
    return _Place(module, kind_of(module), stack, block, inner, table, context)


def _relative(path: str, start: str) -> str:
    return path[len(start) + 1 :] if start else path


def _stack_without_family(block: str) -> str:
    container = block.rpartition(".")[0]
    return _named_stack(container) or container


def _named_stack(path: str, default: str = "") -> str:
    return next((STACKS[part] for part in path.split(".") if part in STACKS), default)


def _number_layers(places: Iterable[_Place]) -> dict[str, int]:
    """Path of a layer -> its running index in its stack, counting the layers that hold parameters."""
    numbers: dict[str, int] = {}
    counts: dict[str, int] = {}
    for place in places:
        holds = any(parameter is not None for parameter in place.module._parameters.values())
        if place.block is not None and place.block not in numbers and holds:
            numbers[place.block] = counts.get(place.stack, 0)
            counts[place.stack] = numbers[place.block] + 1
    return numbers


def span_index(biases: Sequence[Bias]) -> torch.Tensor | None:
    """Positions, in the flattened vector, that `biases` of one parameter cover; `None` for all of it.

    Args:
        biases (`Sequence[Bias]`): Terms that live in one vector.

    Returns:
        `torch.Tensor` of shape `(selected,)`, int64 and ascending, or `None`.
    """
    spans = sorted(span for bias in biases for span in bias.spans)
    size = torch.Size(biases[0].shape).numel()
    if sum(stop - start for start, stop in spans) == size:
        return None
    return torch.cat([torch.arange(start, stop) for start, stop in spans])
