"""Finding the bias terms of a model and choosing among them.

Everything that trains, counts, saves, plots or describes biases goes by [`find_biases`] and [`select_biases`].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigError, NoBiasesError, NoMatchError, UnknownHeadError, collect
from .heads import head_modules, part_of
from .structure import LINEAR, NORM, kind_of, saved_modules
from .survey import Bias, Found, Survey, survey_model
from .vocabulary import TERMS, named_terms, resolve_terms

ALL_LINEAR = "all-linear"  # PEFT's word for all linear layers

# Where a bias is added only to what the user names: adding one to a norm or to an LM head changes the architecture
# beyond the projections that BitFit is about.
_ADDED_IF_NAMED = frozenset({"attention_layernorm", "output_layernorm", "embedding_layernorm", "lm_head"})


def find_biases(
    model: nn.Module, *, add_missing_biases: bool = False, with_untrained_pooler: bool = True
) -> list[Bias]:
    """Finds every bias term outside the task head.

    A bias term is a vector that is *added*: the bias of a known kind of module (linear, convolution, norm, ...), or a
    free-standing vector that is listed for its architecture. Names are never searched for "bias".

    Args:
        model (`torch.nn.Module`): A model, stock or with adapters injected, or a `PeftModel`; meta tensors will do.
        add_missing_biases (`bool`, *optional*, defaults to `False`):
            Also list the projections, norms and LM heads that could be given a bias, with `exists=False`.
        with_untrained_pooler (`bool`, *optional*, defaults to `True`): See [`head_modules`]; what is in the head is
            not listed.

    Returns:
        `list[Bias]`: In model order. A fused projection gives one entry per term; a tied bias is listed once. In a
            class for which [`head_modules`] has no rule, only modules that an adapter saves count as head.

    Example:

    ```python
    >>> biases = find_biases(BertForSequenceClassification.from_pretrained("bert-base-uncased"))
    >>> sum(bias.num_parameters for bias in biases)
    102912
    ```
    """
    survey = survey_model(model)
    return [
        found.bias
        for found in _outside_head(survey, _known_head(survey, with_untrained_pooler=with_untrained_pooler))
        if found.bias.exists or add_missing_biases
    ]


def unknown_vectors(model: nn.Module) -> list[str]:
    """Names of the vectors outside the task head that could be biases but are not known to be, and are not selected.

    Args:
        model (`torch.nn.Module`): A model, stock or with adapters injected, or a `PeftModel`.

    Returns:
        `list[str]`: Stock names of the 1-D parameters that are neither a bias nor the weight of a norm: Mamba's `D`, a
            router's `expert_bias`, BEiT's `lambda_1`, ...

    Example:

    ```python
    >>> unknown_vectors(MambaModel(MambaConfig(num_hidden_layers=1)))
    ['layers.0.mixer.D']
    ```
    """
    survey = survey_model(model)
    head = _known_head(survey)
    return [name for name in survey.unknown if part_of(name, head) is None]


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
    with_untrained_pooler: bool = True,
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
            their term (`"all"` does not).
        modules_to_save (`Sequence[str]`, *optional*): See [`head_modules`]. The head's biases are never selected.
        task_type (`str`, *optional*), with_untrained_pooler (`bool`, *optional*): See [`head_modules`].

    Returns:
        `list[Bias]`: At least one, in model order.

    Raises:
        UnknownTermError: If `bias_terms` names no known term.
        NoBiasesError: If the model has no bias at all, or none of these terms, and none is to be added.
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

    survey = survey_model(model)
    head = head_modules(model, task_type, modules_to_save, with_untrained_pooler=with_untrained_pooler)
    _check_entries(survey, targets, "target_modules")
    _check_entries(survey, excluded, "exclude_modules")
    _check_range(survey, layers)

    candidates = _outside_head(survey, head)
    named = {term for name in named_terms(bias_terms) if name != "all" for term in resolve_terms(name)}
    usable = [
        found.bias for found in candidates if found.bias.exists or (add_missing_biases and _may_be_added(found, named))
    ]
    if not usable:
        raise NoBiasesError(_no_biases_message(survey, candidates))

    rules = [_Rule("bias_terms", bias_terms, lambda bias: bias.term in terms)]
    if targets is not None:
        rules.append(_Rule("target_modules", target_modules, lambda bias: _fits_bias(survey, bias, targets)))
    if excluded is not None:
        rules.append(_Rule("exclude_modules", exclude_modules, lambda bias: not _fits_bias(survey, bias, excluded)))
    if layers is not None:
        rules.append(_Rule("layers_to_transform", layers_to_transform, lambda bias: bias.layer in layers))
    chosen = [bias for bias in usable if all(rule.keeps(bias) for rule in rules)]
    if not chosen:
        addable = [] if add_missing_biases else [found.bias for found in candidates if _may_be_added(found, named)]
        absent = not any(bias.term in terms for bias in usable)
        raise (NoBiasesError if absent else NoMatchError)(_nothing_left_message(survey, usable, addable, rules))
    return chosen


@dataclass(frozen=True)
class _Rule:
    """One argument of [`select_biases`] and what it keeps."""

    argument: str
    value: object
    keeps: Callable[[Bias], bool]


# --- the head --------------------------------------------------------------------------------------------------------


def _known_head(survey: Survey, *, with_untrained_pooler: bool = True) -> list[str]:
    """The head by the model's class, and what adapters train whole; a class without a rule is no error here."""
    saved = saved_modules(survey.root)
    try:
        return [*head_modules(survey.root, with_untrained_pooler=with_untrained_pooler), *saved]
    except UnknownHeadError:
        return saved


def _outside_head(survey: Survey, head: Collection[str]) -> list[Found]:
    return [found for found in survey.found if part_of(found.bias.name, head) is None]


# --- checking and applying the arguments -----------------------------------------------------------------------------


def _may_be_added(found: Found, named: set[str]) -> bool:
    """Whether `add_missing_biases` adds this bias, which does not exist, given the terms named one by one."""
    if found.bias.exists:
        return False
    if found.kind == NORM or found.bias.term == "lm_head":
        return found.bias.term in named & _ADDED_IF_NAMED
    return True


def _check_names(names: str | Sequence[str] | None, argument: str) -> str | list[str] | None:
    if names is None:
        return None
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ConfigError(f"{argument}={names!r} is not a regular expression: {error}.") from error
        return names
    if isinstance(names, (list, tuple, set, frozenset)):
        wrong = [name for name in names if not isinstance(name, str)]
        if not wrong:
            return list(names)
        raise ConfigError(f"{argument} must hold strings only, but {wrong[0]!r} is of type {type(wrong[0]).__name__}.")
    raise ConfigError(f"{argument} must be a string or a list of strings, but is {names!r}.")


def _check_layers(layers: int | Sequence[int] | None) -> set[int] | None:
    if layers is None:
        return None
    listed = list(layers) if isinstance(layers, (list, tuple, set, frozenset, range)) else [layers]
    indices = {layer for layer in listed if isinstance(layer, int) and not isinstance(layer, bool)}
    if not listed or len(indices) < len(set(map(repr, listed))):
        raise ConfigError(f"layers_to_transform must be an integer or a list of integers, but is {layers!r}.")
    return indices


def _fits(survey: Survey, path: str, names: str | list[str]) -> bool:
    """Whether a module fits `target_modules` or `exclude_modules`, by PEFT's rules."""
    if isinstance(names, str) and names.lower() == ALL_LINEAR:
        return kind_of(survey.modules[path]) == LINEAR
    return fits(path, names)


def fits(path: str, names: str | Sequence[str]) -> bool:
    """Whether a path fits `target_modules` or `exclude_modules`: a regular expression, or ends of paths."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def _fits_bias(survey: Survey, bias: Bias, names: str | list[str]) -> bool:
    return any(_fits(survey, path, names) for path in bias.modules)


def _check_entries(survey: Survey, names: str | list[str] | None, argument: str) -> None:
    if not isinstance(names, list):
        return
    unmatched = [name for name in names if not any(_fits(survey, path, [name]) for path in survey.modules)]
    if unmatched:
        raise NoMatchError(
            f"{argument} has entries that match no module of {type(survey.root).__name__}:"
            f"{collect(map(repr, unmatched))}\n"
            "An entry of a list is a module's path or the dotted end of it; for a regular expression, pass a string."
        )


def _check_range(survey: Survey, layers: set[int] | None) -> None:
    wrong = sorted(layer for layer in layers or () if not 0 <= layer < survey.num_layers)
    if not wrong:
        return
    name = type(survey.root).__name__
    if not survey.num_layers:
        raise NoMatchError(f"layers_to_transform is given, but {name} has no numbered layers. Leave it out.")
    raise NoMatchError(
        f"layers_to_transform names layers that {name} does not have: {', '.join(map(str, wrong))}. "
        f"Its layers are 0 to {survey.num_layers - 1}."
    )


# --- messages --------------------------------------------------------------------------------------------------------


def _no_biases_message(survey: Survey, candidates: list[Found]) -> str:
    message = f"{type(survey.root).__name__} has no bias terms outside its head, so there is nothing to tune."
    if any(_may_be_added(found, set()) for found in candidates):
        return f"{message} Pass add_missing_biases=True to give each targeted projection a bias that starts at zero."
    return f"{message} It has no projection either that could be given one."


def _nothing_left_message(survey: Survey, usable: list[Bias], addable: list[Bias], rules: list[_Rule]) -> str:
    name = type(survey.root).__name__
    steps, left = [], usable
    for rule in rules:
        if rule.value == "all":
            continue
        left = [bias for bias in left if rule.keeps(bias)]
        steps.append(f"{rule.argument}={rule.value!r} leaves {len(left) or 'none'}")
        if not left:
            break
    message = f"Nothing is left to tune in {name}: of its {len(usable)} bias terms {', of these '.join(steps)}."
    if not any(rules[0].keeps(bias) for bias in usable):
        present = [term for term in TERMS if any(bias.term == term for bias in usable)]
        message += f" The terms it has are {', '.join(present)}."
    if any(all(rule.keeps(bias) for rule in rules) for bias in addable):
        message += " Pass add_missing_biases=True to give the modules that fit, but have no bias, one."
    return message
