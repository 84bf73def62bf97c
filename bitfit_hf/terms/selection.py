"""Finding the bias terms of a model and choosing among them.

Everything that trains, counts, saves, plots or describes biases goes by [`find_biases`] and [`select_biases`].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, NoBiasesError, NoMatchError, UnknownHeadError, collect
from .families import STACKS, TORCH_LAYERS, Family, Spans, family_of, lookup, thirds
from .heads import head_modules
from .structure import LINEAR, MULTIHEAD, NORM, kind_of, out_features, own_bias, shape_of, stock_root, walk
from .vocabulary import TERMS, named_terms, resolve_terms


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
        aliases (`tuple[str, ...]`, *optional*): Other places that use the same tied parameter.
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
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    @property
    def num_parameters(self) -> int:
        """How many scalars belong to the term here."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True)
class _Found:
    """A bias and the kind of its module (`None` for a free-standing vector)."""

    bias: Bias
    kind: str | None


@dataclass
class _Survey:
    """One pass over a model: its modules, its biases, and how many layers its stacks have."""

    root: nn.Module
    modules: dict[str, nn.Module] = field(default_factory=dict)
    found: list[_Found] = field(default_factory=list)
    num_layers: int = 0
    recognised: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Place:
    """Where a module stands: its layer's path (`""` outside the layers), the rest, and what names its terms there."""

    stack: str
    block: str
    inner: str
    table: Mapping[str, str]
    family: Family | None
    config: object
    torch_attention: bool

    def term(self) -> str:
        if self.torch_attention:
            return "attention_output"
        if self.block:
            term = lookup(self.table, self.inner)
            return term if isinstance(term, str) else "other"
        return self.family.outside_term(self.inner) if self.family else "other"

    def terms(self, size: int, kind: str | None) -> dict[str, Spans]:
        """Which index ranges of a vector of `size` elements belong to which term."""
        if kind == MULTIHEAD:
            return thirds(size)
        if self.family is not None and self.block:
            layout = lookup(self.family.fused, self.inner)
            if callable(layout):
                return layout(size, self.config)
        return {self.term(): ((0, size),)}


def find_biases(model: nn.Module, *, add_missing_biases: bool = False) -> list[Bias]:
    """Finds every bias term outside the task head.

    A bias term is a vector that is *added*: the bias of a known kind of module (linear, convolution, norm, ...), or a
    free-standing vector that is listed for its architecture. Names are never searched for "bias".

    Args:
        model (`torch.nn.Module`): A model, stock or with adapters injected, or a `PeftModel`; meta tensors will do.
        add_missing_biases (`bool`, *optional*, defaults to `False`):
            Also list the projections, norms and LM heads that could be given a bias, with `exists=False`.

    Returns:
        `list[Bias]`: In model order. A fused projection gives one entry per term; a tied bias is listed once.

    Example:
        ```python
        >>> biases = find_biases(BertForSequenceClassification(BertConfig()))
        >>> sum(bias.num_parameters for bias in biases)
        102912
        ```
    """
    survey = _survey(model)
    head = _known_head(survey.root, model)
    return [found.bias for found in _outside(survey, head) if found.bias.exists or add_missing_biases]


def unknown_vectors(model: nn.Module) -> list[str]:
    """Names of the vectors that look like biases but are not known to be any, and so are never selected.

    Args:
        model (`torch.nn.Module`): A model, stock or with adapters injected, or a `PeftModel`.

    Returns:
        `list[str]`: Stock names of 1-D parameters that are neither a bias nor the weight of a norm: Mamba's `D`, a
            router's `expert_bias`, BEiT's `lambda_1`, ...
    """
    survey = _survey(model)
    head = _known_head(survey.root, model)
    names, seen = [], set(survey.recognised)
    for path, module in survey.modules.items():
        norm = "Norm" in type(module).__name__
        for name, parameter in module._parameters.items():
            if parameter is None or len(shape_of(parameter)) != 1 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not (norm and name == "weight") and path not in head:
                names.append(f"{path}.{name}" if path else name)
    return names


def select_biases(
    model: nn.Module,
    *,
    bias_terms: str | Sequence[str] = "all",
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    add_missing_biases: bool = False,
    modules_to_save: Sequence[str] | None = None,
    task_type: str | None = None,
) -> list[Bias]:
    """Chooses the bias terms to tune: those that every argument agrees on.

    Args:
        model (`torch.nn.Module`): A model, stock or with adapters injected, or a `PeftModel`.
        bias_terms (`str` or `Sequence[str]`, *optional*, defaults to `"all"`): See [`resolve_terms`].
        target_modules (`str` or `Sequence[str]`, *optional*):
            As in PEFT: a list of module paths or dotted ends of paths, a regular expression for the whole path, or
            `"all-linear"`.
        exclude_modules (`str` or `Sequence[str]`, *optional*): The same, for what to leave out.
        layers_to_transform (`int` or `Sequence[int]`, *optional*):
            Indices of the layers to tune. What lies outside the layers is left out then.
        add_missing_biases (`bool`, *optional*, defaults to `False`):
            Give each chosen projection without a bias one. Norms and LM heads get one only if `bias_terms` names
            their term.
        modules_to_save (`Sequence[str]`, *optional*): See [`head_modules`]. The head's biases are never selected.
        task_type (`str`, *optional*): See [`head_modules`].

    Returns:
        `list[Bias]`: At least one, in model order.

    Raises:
        UnknownTermError: If `bias_terms` names no known term.
        NoBiasesError: If the model has no bias at all, and none is to be added.
        NoMatchError: If an argument matches nothing, or the arguments have nothing in common.
        UnknownHeadError: If it is not known what the model's head is.
        ConfigError: If an argument has the wrong type.

    Example:
        ```python
        >>> biases = select_biases(BertModel(BertConfig()), bias_terms="query+intermediate")
        >>> sum(bias.num_parameters for bias in biases)
        46080
        ```
    """
    terms = resolve_terms(bias_terms)
    targets = _check_names(target_modules, "target_modules")
    excluded = _check_names(exclude_modules, "exclude_modules")
    layers = _check_layers(layers_to_transform)

    survey = _survey(model)
    head = frozenset(head_modules(model, task_type=task_type, modules_to_save=modules_to_save))
    candidates = list(_outside(survey, head))
    _check_entries(survey, targets, "target_modules")
    _check_entries(survey, excluded, "exclude_modules")
    _check_range(survey, layers)

    named = {term for name in named_terms(bias_terms) if name != "all" for term in resolve_terms(name)}
    usable = [found for found in candidates if found.bias.exists or (add_missing_biases and _may_be_added(found, named))]
    if not usable and not (add_missing_biases and candidates):
        raise NoBiasesError(_no_biases_message(survey, candidates))

    steps = [("bias_terms", bias_terms, lambda bias: bias.term in terms)]
    if targets is not None:
        steps.append(("target_modules", target_modules, lambda bias: _matches(survey, bias, targets)))
    if excluded is not None:
        steps.append(("exclude_modules", exclude_modules, lambda bias: not _matches(survey, bias, excluded)))
    if layers is not None:
        steps.append(("layers_to_transform", layers_to_transform, lambda bias: bias.layer in layers))
    chosen = [found.bias for found in usable if all(keep(found.bias) for _, _, keep in steps)]
    if not chosen:
        raise NoMatchError(_no_match_message(survey, usable, candidates, steps, add_missing_biases))
    return chosen


# --- surveying a model -----------------------------------------------------------------------------------------------


def _survey(model: nn.Module) -> _Survey:
    root = stock_root(model)
    survey = _Survey(root)
    owners: dict[int, int] = {}
    free: list[tuple[int, _Place, str, nn.Module]] = []
    placed: list[tuple[str, nn.Module, str | None, _Place]] = []
    for path, module, place in _places(root):
        survey.modules[path] = module
        placed.append((path, module, kind_of(module), place))
    numbers = _number_layers(place for _, _, _, place in placed)
    survey.num_layers = 1 + max((number for number in numbers.values()), default=-1)
    stacks = {place.stack for _, _, _, place in placed if place.block}

    def add(path: str, name: str, place: _Place, kind: str | None, shape: tuple[int, ...], exists: bool) -> None:
        layer = numbers.get(place.block) if place.block else None
        stack = place.stack if len(stacks) > 1 else ""
        size = 1
        for extent in shape:
            size *= extent
        for term, spans in place.terms(size, kind).items():
            survey.found.append(_Found(Bias(path, name, term, layer, stack, shape, spans, exists), kind))

    missing_seen: set[int] = set()
    for path, module, kind, place in placed:
        if kind is not None:
            bias = own_bias(module, kind)
            weight = module._parameters.get("weight") if kind == NORM else None
            if weight is not None:
                survey.recognised.add(id(weight))
            if bias is not None:
                name = "in_proj_bias" if kind == MULTIHEAD else "bias"
                if id(bias) in owners:
                    _add_alias(survey.found, owners[id(bias)], f"{path}.{name}" if path else name)
                    continue
                owners[id(bias)] = len(survey.found)
                survey.recognised.add(id(bias))
                add(path, name, place, kind, shape_of(bias), True)
            elif kind in (LINEAR, NORM) and id(module) not in missing_seen:
                missing_seen.add(id(module))
                size = out_features(module, kind)
                if size:
                    add(path, "bias", place, kind, (size,), False)
        elif place.family is not None and place.block and place.family.free:
            for name, parameter in module._parameters.items():
                term = lookup(place.family.free, f"{place.inner}.{name}" if place.inner else name)
                if parameter is None or not isinstance(term, str) or id(parameter) in owners:
                    continue
                owners[id(parameter)] = len(survey.found)
                survey.recognised.add(id(parameter))
                shape = shape_of(parameter)
                size = parameter.numel()
                layer = numbers.get(place.block)
                stack = place.stack if len(stacks) > 1 else ""
                survey.found.append(_Found(Bias(path, name, term, layer, stack, shape, ((0, size),)), None))
    return survey


def _add_alias(found: list[_Found], index: int, alias: str) -> None:
    first = found[index].bias
    while index < len(found) and found[index].bias.name == first.name:
        bias = found[index].bias
        found[index] = replace(found[index], bias=replace(bias, aliases=(*bias.aliases, alias)))
        index += 1


@dataclass(frozen=True)
class _Context:
    """What a subtree inherits: the model it belongs to and, inside a layer of torch's own, that layer."""

    start: str = ""
    family: Family | None = None
    config: object = None
    stack: str = ""
    torch_layer: tuple[str, Mapping[str, str]] | None = None
    torch_attention: bool = False


def _places(root: nn.Module) -> Iterator[tuple[str, nn.Module, _Place]]:
    contexts: dict[str, _Context] = {}
    for path, module in walk(root):
        parent, _, _ = path.rpartition(".")
        context = contexts[parent] if path else _Context()
        if isinstance(module, PreTrainedModel):
            family = family_of(module)
            if family is not None and family is not context.family:
                relative = path[len(context.start) :].lstrip(".")
                stack = next((STACKS[part] for part in relative.split(".") if part in STACKS), context.stack)
                context = _Context(start=path, family=family, config=module.config, stack=stack)
        if context.family is None:
            for layer_type, table in TORCH_LAYERS:
                if isinstance(module, layer_type):
                    context = replace(context, torch_layer=(path, table))
        yield path, module, _place(path, context)
        contexts[path] = replace(context, torch_attention=isinstance(module, nn.MultiheadAttention))


_NUMBERED = re.compile(r"((?:.*?\.)??[0-9]+)(?:\.|$)")


def _place(path: str, context: _Context) -> _Place:
    relative = path[len(context.start) + 1 :] if context.start else path
    block, inner, table = "", relative, {}
    stack = context.stack
    if context.family is not None:
        split = context.family.split(relative)
        if split is not None:
            own_block, inner, table = split
            block = f"{context.start}.{own_block}" if context.start else own_block
        own_stack = context.family.stack(relative)
        stack = own_stack if not stack or stack == own_stack else f"{stack}.{own_stack}".rstrip(".")
    elif context.torch_layer is not None:
        block, table = context.torch_layer
        inner = path[len(block) + 1 :] if block else path
        stack = _unnamed_stack(block)
        block = block or "."
    else:
        match = _NUMBERED.match(relative)
        if match:
            block, inner = match.group(1), relative[match.end(1) + 1 :]
            stack = _unnamed_stack(block)
    return _Place(stack, block, inner, table, context.family, context.config, context.torch_attention)


def _unnamed_stack(block: str) -> str:
    container = block.rpartition(".")[0]
    return next((STACKS[part] for part in container.split(".") if part in STACKS), container)


def _number_layers(places: Iterable[_Place]) -> dict[str, int]:
    """Layer path -> running index in its stack."""
    numbers: dict[str, int] = {}
    counts: dict[str, int] = {}
    for place in places:
        if place.block and place.block not in numbers:
            numbers[place.block] = counts.get(place.stack, 0)
            counts[place.stack] = numbers[place.block] + 1
    return numbers


def _known_head(root: nn.Module, model: nn.Module) -> frozenset[str]:
    """The head by the model's class; none for a class without a rule, where only training has to know."""
    try:
        return frozenset(head_modules(model))
    except UnknownHeadError:
        return frozenset()


def _outside(survey: _Survey, head: frozenset[str]) -> Iterator[_Found]:
    for found in survey.found:
        parts = found.bias.module.split(".")
        if not any(".".join(parts[:end]) in head for end in range(1, len(parts) + 1)):
            yield found


# --- choosing --------------------------------------------------------------------------------------------------------


def _may_be_added(found: _Found, named: set[str]) -> bool:
    if found.kind == NORM or found.bias.term == "lm_head":
        return found.bias.term in named and found.bias.term != "other"
    return found.bias.term != "embedding_layernorm"


def _check_names(names: str | Sequence[str] | None, argument: str) -> str | list[str] | None:
    if names is None:
        return None
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ConfigError(f"{argument}={names!r} is not a regular expression: {error}.") from error
        return names
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{argument} must be a string or a list of strings, but is {names!r}.")
    return list(names)


def _check_layers(layers: int | Sequence[int] | None) -> list[int] | None:
    if layers is None:
        return None
    listed = list(layers) if isinstance(layers, (list, tuple, set, frozenset, range)) else [layers]
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in listed) or not listed:
        raise ConfigError(f"layers_to_transform must be an integer or a list of integers, but is {layers!r}.")
    return listed


def _fits(survey: _Survey, path: str, names: str | list[str]) -> bool:
    """Whether a module path fits `target_modules` or `exclude_modules`, by PEFT's rules."""
    if names == "all-linear":
        return kind_of(survey.modules[path]) == LINEAR
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def _matches(survey: _Survey, bias: Bias, names: str | list[str]) -> bool:
    places = [bias.module, *(alias.rpartition(".")[0] for alias in bias.aliases)]
    return any(_fits(survey, path, names) for path in places)


def _check_entries(survey: _Survey, names: str | list[str] | None, argument: str) -> None:
    if not isinstance(names, list):
        return
    unmatched = [name for name in names if not any(_fits(survey, path, [name]) for path in survey.modules)]
    if unmatched:
        raise NoMatchError(
            f"{argument} has entries that match no module of {type(survey.root).__name__}:"
            f"{collect(map(repr, unmatched))}\n"
            "An entry is a module's path or the dotted end of it; a single string is a regular expression."
        )


def _check_range(survey: _Survey, layers: list[int] | None) -> None:
    wrong = [layer for layer in layers or () if not 0 <= layer < survey.num_layers]
    if not wrong:
        return
    valid = f"0 to {survey.num_layers - 1}" if survey.num_layers else "none, as it has no numbered layers"
    raise NoMatchError(
        f"layers_to_transform names layers that {type(survey.root).__name__} does not have: "
        f"{', '.join(map(str, wrong))}. Valid indices: {valid}."
    )


def _no_biases_message(survey: _Survey, candidates: list[_Found]) -> str:
    name = type(survey.root).__name__
    if not any(found.kind == LINEAR for found in candidates):
        return f"{name} has no bias terms outside its head, and no projections that could be given any."
    return (
        f"{name} has no bias terms outside its head, so there is nothing to tune. Pass add_missing_biases=True to give "
        "each targeted projection a bias that starts at zero."
    )


def _no_match_message(survey, usable, candidates, steps, add_missing_biases) -> str:
    name = type(survey.root).__name__
    alone = [
        f"{argument}={value!r}" for argument, value, keep in steps if not any(keep(found.bias) for found in usable)
    ]
    given = ", ".join(f"{argument}={value!r}" for argument, value, _ in steps)
    reason = f"{' and '.join(alone)} {'fits' if len(alone) == 1 else 'fit'} none of them" if alone else (
        "each argument fits some of them, but no bias fits all"
    )
    present = [term for term in TERMS if any(found.bias.term == term for found in usable)]
    message = (
        f"Nothing is left to tune in {name} with {given}: of its {len(usable)} bias terms, {reason}. "
        f"The terms it has are: {', '.join(present) or 'none'}."
    )
    if not add_missing_biases and any(
        not found.bias.exists and all(keep(found.bias) for _, _, keep in steps) for found in candidates
    ):
        message += " With add_missing_biases=True, layers without a bias that fit would be given one."
    return message
