"""Parameter groups for bias-only fine-tuning, and how an unmodified Trainer comes to use them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import BitFitConfig
from ..errors import ConfigError, OptimizerError, collect
from ..storage.bias_layout import decode_layout
from ..storage.keys import bias_of_key, key_of_bias
from ..terms import TERMS
from ..tuner.state import delta_parameters, head_leaves, tuned_layers
from .checks import adapter_configs
from .rates import HEAD, LrScale, term_scale

if TYPE_CHECKING:
    from transformers import Trainer

Groups = Callable[[nn.Module], list[dict[str, Any]]]


def optimizer_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    head_learning_rate: float | None = None,
    lr_scale: LrScale = "default",
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """
    The parameters to train, grouped for any torch optimizer.

    A delta is a difference to a pre-trained bias and is not decayed: decay would pull it back to the base, and the
    paper uses none. The head is decayed as the Trainer does it, its weights but not its biases and norms.

    Args:
        model (`nn.Module`): With a BitFit adapter injected, or a `PeftModel`.
        learning_rate (`float`): For the deltas, see [`recommended_learning_rate`].
        head_learning_rate (`float`, *optional*): For the head; what `lr_scale` says by default.
        lr_scale (`str` or `Mapping[str, float]`, *optional*, defaults to `"default"`):
            Multiples of `learning_rate` by bias term: `"default"` is [`DEFAULT_SCALE`], which is explained there,
            `"uniform"` is the paper's one rate for all, a mapping gives terms (or their symbols) and `"head"` a
            multiple each, and those that it does not name 1.0.
        weight_decay (`float`, *optional*, defaults to 0.0): Of the head's weights.

    Returns:
        `list[dict]`: Groups with `params`, `lr`, `weight_decay` and a `name`: `"delta"` of the deltas with
        `learning_rate`, `"delta:<term>+<term>"` of those with a multiple of it, by rising rate; then `"head"` and
        `"head_no_decay"`. Frozen parameters are in none, every trainable one of the adapters is in exactly one.

    Raises:
        [`OptimizerError`]: The model has no trainable BitFit adapter.
        [`UnknownTermError`], [`ConfigError`]: `lr_scale` cannot be used, or gives the terms of a fused vector
            different rates.

    Example:

    ```python
    optimizer = torch.optim.AdamW(optimizer_groups(model, 1e-3, head_learning_rate=5e-4, weight_decay=0.01))
    ```
    """
    deltas = trainable_deltas(model)
    if not deltas:
        raise OptimizerError(
            f"{type(model).__name__} has no trainable BitFit delta. Inject one first: "
            "`model = get_peft_model(model, BitFitConfig())`, or pass a BitFitCallback to the Trainer. An adapter "
            "that was loaded for inference becomes trainable with `is_trainable=True`."
        )
    decayed, plain = trainable_head(model)
    scale = term_scale(lr_scale)
    head_rate = learning_rate * scale[HEAD] if head_learning_rate is None else head_learning_rate
    groups = [
        {"name": name, "params": params, "lr": learning_rate * factor, "weight_decay": 0.0}
        for name, factor, params in _by_rate(model, deltas, scale)
    ]
    groups += [
        {"name": "head", "params": list(decayed.values()), "lr": head_rate, "weight_decay": weight_decay},
        {"name": "head_no_decay", "params": list(plain.values()), "lr": head_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _by_rate(
    model: nn.Module, deltas: Mapping[str, nn.Parameter], scale: Mapping[str, float]
) -> list[tuple[str, float, list[nn.Parameter]]]:
    """The deltas by their multiple of the learning rate, each with the name of its group."""
    known = {adapter: _terms_of_keys(config) for adapter, config in adapter_configs(model).items()}
    members: dict[float, list[nn.Parameter]] = {}
    terms_at: dict[float, set[str]] = {}
    problems = []
    for name, parameter in deltas.items():
        adapter, _, key = name.partition(":")
        terms = known[adapter].get(key, ("other",))
        factors = {scale[term] for term in terms}
        if len(factors) > 1:
            told = ", ".join(f"{term} {scale[term]:g}" for term in terms)
            problems.append(f"{bias_of_key(key)} holds several terms in one vector: {told}")
            continue
        (factor,) = factors
        members.setdefault(factor, []).append(parameter)
        terms_at.setdefault(factor, set()).update(terms)
    if problems:
        raise ConfigError(
            f"`lr_scale` gives parts of one parameter different rates, which no optimizer can:{collect(problems)}\n"
            "Give these terms the same multiple."
        )
    ordered = sorted(members, key=lambda factor: (factor != 1.0, factor))
    return [
        (
            "delta" if factor == 1.0 else f"delta:{'+'.join(t for t in TERMS if t in terms_at[factor])}",
            factor,
            members[factor],
        )
        for factor in ordered
    ]


def _terms_of_keys(config: BitFitConfig) -> dict[str, tuple[str, ...]]:
    """The terms of each delta of an adapter; several where a parameter is fused of them."""
    terms: dict[str, tuple[str, ...]] = {}
    for bias in decode_layout(config.bias_layout or {}):
        key = key_of_bias(bias.name)
        if bias.term not in terms.get(key, ()):
            terms[key] = (*terms.get(key, ()), bias.term)
    return terms


def trainable_deltas(model: nn.Module) -> dict[str, nn.Parameter]:
    """The deltas that require gradients, by adapter and file name; a tied one once."""
    names = {name for _, layer in tuned_layers(model) for name in layer._get_available_adapters()}
    return {
        f"{adapter}:{key}": parameter
        for adapter in sorted(names)
        for key, parameter in delta_parameters(model, adapter).items()
        if parameter.requires_grad
    }


def trainable_head(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The head's parameters that require gradients: those that weight decay is for, and its biases and norms."""
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for path, leaf in head_leaves(model):
        for adapter, module in leaf.modules_to_save.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    target = decayed if leaf.is_weight(parameter) else plain
                    target[f"{adapter}:{path}.{name}"] = parameter
    return decayed, plain


def check_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    groups: Groups | None = None,
    resumed: bool = False,
) -> None:
    """Checks that `optimizer` trains the deltas and the head of `model`, nothing else, and decays no delta.

    Args:
        model (`nn.Module`): With a BitFit adapter injected.
        optimizer (`torch.optim.Optimizer`): Or a wrapper with `param_groups`.
        groups (`Callable`, *optional*):
            Makes the groups that were asked for, whose rates `optimizer` has to use.
        resumed (`bool`, *optional*, defaults to `False`): Whether the groups' values come from a checkpoint.

    Raises:
        [`OptimizerError`]: It does something else; what is named.
    """
    deltas = trainable_deltas(model)
    decayed, plain = trainable_head(model)
    head = decayed | plain
    if not deltas:
        raise OptimizerError(
            "No delta of the model requires gradients, so at most the head would be trained. Leave `requires_grad` of "
            "the adapter's parameters as it is."
        )
    held = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = {id(parameter): name for name, parameter in (deltas | head).items()}

    problems = [f"{name} is not in it" for key, name in wanted.items() if key not in held]
    problems += [f"{named[key]} is in it" for key in held if key in named and key not in wanted]
    foreign = sum(key not in named and key not in wanted for key in held)
    problems += [f"{foreign} parameters of another model are in it"] if foreign else []
    problems += [
        f"{name} requires gradients but is neither a delta nor the head"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in wanted and id(parameter) not in held
    ]
    problems += [
        f"{name} is decayed by {held[id(parameter)]['weight_decay']}"
        for name, parameter in deltas.items()
        if held.get(id(parameter), {}).get("weight_decay")
    ]
    if problems:
        raise OptimizerError(
            "The optimizer has to train the deltas and the head, and them alone, without decay of the deltas:"
            f"{collect(problems)}\n"
            "Leave the base frozen. An optimizer of your own has to be made from `bitfit_hf.optimizer_groups(model, "
            "learning_rate, …)`, after `model = get_peft_model(model, BitFitConfig(...))`."
        )
    if groups is not None:
        problems = list(dict.fromkeys(_other_rates(groups(model), held)))
    if problems:
        remedy = _RESUMED if resumed else _KEPT if made_by_trainer(optimizer) else _OWN
        raise OptimizerError(
            f"The optimizer's parameter groups do not use the rates that were asked for:{collect(problems)}\n{remedy}"
        )


_OWN = (
    "An optimizer of your own brings its rates along: give them to `bitfit_hf.optimizer_groups`, and none to the "
    "callback."
)
_KEPT = (
    "They were changed after the Trainer had made its optimizer, which it keeps for every later `train()`. Set "
    "`trainer.optimizer = None` to have a new one made, or make a new Trainer."
)
_RESUMED = (
    "A resumed run keeps the rates that its checkpoint was saved with: ask for these again. For other rates start a "
    "new run from the checkpoint's delta, without `resume_from_checkpoint`."
)


def base_rates(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> set[float]:
    """The learning rates, before any schedule, with which `optimizer` trains `parameters`."""
    held = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return {_base_rate(held[id(parameter)]) for parameter in parameters}


def _base_rate(group: Mapping[str, Any]) -> float:
    # Schedules keep the rate that a group began with in `initial_lr`.
    return float(group.get("initial_lr", group["lr"]))


def _other_rates(asked: Iterable[dict[str, Any]], held: Mapping[int, Mapping[str, Any]]) -> Iterable[str]:
    for group in asked:
        found = {_base_rate(held[id(parameter)]) for parameter in group["params"]}
        if found - {group["lr"]}:
            what = "head" if group["name"].startswith("head") else "deltas"
            if ":" in group["name"]:
                what += f" of {group['name'].partition(':')[2]}"
            yield f"learning rate of the {what}: {', '.join(map(str, sorted(found)))} instead of {group['lr']}"


# --- the optimizer that a Trainer makes ---

# The optimizers that Trainers have made with our groups.
_made: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
# What a Trainer of another library may hand to its optimizer in place of the stock groups.
_GROUPS = ("params", "model", "optimizer_dict")


def made_by_trainer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a Trainer has made `optimizer`, or what accelerate has wrapped in it, with BitFit's groups."""
    return getattr(optimizer, "optimizer", optimizer) in _made


def create_optimizer(
    create: Callable[..., torch.optim.Optimizer], trainer: Trainer, groups: Groups, *args: Any, **kwargs: Any
) -> torch.optim.Optimizer:
    """Has a Trainer make its optimizer with BitFit's groups: they are right from the first step, also on resume.

    The Trainer takes its groups from `optimizer_cls_and_kwargs` where a user has given them there; they are put there
    for as long as it makes the optimizer. An optimizer or groups that somebody else has chosen are left as they are,
    and checked like any other before the first step.

    Args:
        create (`Callable`): The Trainer's own `create_optimizer`.
        trainer ([`~transformers.Trainer`]): The Trainer.
        groups (`Callable`): Makes the groups of a model.
        args, kwargs: For `create`: the model, where it is not the Trainer's but that in FSDP's wrapper.

    Returns:
        `torch.optim.Optimizer`: What `create` returns.
    """
    model: Any = (args[0] if args else kwargs.get("model")) or trainer.model
    chosen = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    if chosen or not trainable_deltas(model):
        return create(*args, **kwargs)
    cls, values = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    if not isinstance(cls, type) or any(name in values for name in _GROUPS):
        return create(*args, **kwargs)
    made = groups(model)
    for group in made:
        group["initial_lr"] = group["lr"]  # not every schedule notes it
    trainer.optimizer_cls_and_kwargs = cls, {**values, "params": made}
    try:
        optimizer = create(*args, **kwargs)
    finally:
        trainer.optimizer_cls_and_kwargs = None
    if [group.get("name") for group in optimizer.param_groups] == [group["name"] for group in made]:
        optimizer.register_load_state_dict_pre_hook(_check_saved_groups)
        _made.add(optimizer)
    return optimizer


def _check_saved_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    saved, own = (
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
    )
    if saved != own:
        names = [group["name"] for group in optimizer.param_groups]
        raise OptimizerError(
            f"The checkpoint's optimizer has parameter groups of {saved} tensors, and this run's ({', '.join(names)}) "
            f"are of {own}. The checkpoint was saved by a Trainer without this callback, with another `lr_scale`, or "
            "with another choice of parameters. Resume as it was saved, or start a new run from its delta, without "
            "`resume_from_checkpoint`."
        )
