"""Parameter groups for bias-only fine-tuning, and how an unmodified Trainer comes to use them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import OptimizerError, TrainerSetupError, collect
from ..tuner.state import delta_parameters, head_leaves, is_bitfit, tuned_layers

if TYPE_CHECKING:
    from transformers import TrainingArguments


def optimizer_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """
    The parameters to train, grouped for any torch optimizer.

    A delta is a difference to a pre-trained bias and is not decayed: decay would pull it back to the base, and the
    paper uses none. The head is decayed as the Trainer does it, its weights but not its biases and norms.

    Args:
        model (`nn.Module`): With a BitFit adapter injected, or a `PeftModel`.
        learning_rate (`float`): For the deltas. The paper searched 1e-4 to 1e-3.
        head_learning_rate (`float`, *optional*): For the head; the same as the deltas' by default.
        weight_decay (`float`, *optional*, defaults to 0.0): Of the head's weights.

    Returns:
        `list[dict]`: Up to three groups with `params`, `lr`, `weight_decay` and a `name`: `"delta"`, `"head"` and
        `"head_no_decay"`. Frozen parameters are in none, every trainable one of the adapters is in exactly one.

    Raises:
        [`OptimizerError`]: The model has no trainable BitFit adapter.

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
    head_rate = learning_rate if head_learning_rate is None else head_learning_rate
    groups = [
        {"name": "delta", "params": list(deltas.values()), "lr": learning_rate, "weight_decay": 0.0},
        {"name": "head", "params": list(decayed.values()), "lr": head_rate, "weight_decay": weight_decay},
        {"name": "head_no_decay", "params": list(plain.values()), "lr": head_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
                    target = decayed if parameter.dim() > 1 else plain
                    target[f"{adapter}:{path}.{name}"] = parameter
    return decayed, plain


def check_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
) -> None:
    """Checks that `optimizer` trains the deltas and the head of `model`, nothing else, and decays no delta.

    Args:
        model (`nn.Module`): With a BitFit adapter injected.
        optimizer (`torch.optim.Optimizer`): Or a wrapper with `param_groups`.
        learning_rate (`float`, *optional*), head_learning_rate (`float`, *optional*):
            Where a rate for the head was asked for: the base rates that the groups have to show.

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
    if head_learning_rate is not None:
        problems += _rates(deltas, held, learning_rate, "deltas")
        problems += _rates(head, held, head_learning_rate, "head")
    if problems:
        raise OptimizerError(
            f"The optimizer does not use the rates that were asked for:{collect(problems)}\n"
            "An optimizer of your own brings its rates along: give them to `bitfit_hf.optimizer_groups`, and none to "
            "the callback. A resumed run keeps the rates that its checkpoint was saved with."
        )


def base_rates(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> set[float]:
    """The learning rates, before any schedule, with which `optimizer` trains `parameters`."""
    held = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return {_base_rate(held[id(parameter)]) for parameter in parameters}


def _base_rate(group: dict[str, Any]) -> float:
    # The scheduler keeps the rate that a group began with in `initial_lr`.
    return float(group.get("initial_lr", group["lr"]))


def _rates(
    parameters: dict[str, nn.Parameter], held: dict[int, dict[str, Any]], rate: float | None, what: str
) -> Iterable[str]:
    found = {_base_rate(held[id(parameter)]) for parameter in parameters.values()}
    if rate is not None and found - {rate}:
        yield f"learning rate of the {what}: {', '.join(map(str, sorted(found)))} instead of {rate}"


# --- the optimizer that a Trainer makes ---

# Where the latest rate for a head waits for a model that `model_init` is still to make.
_HEAD_RATE = "_bitfit_head_learning_rate"
# A Trainer is known by its model and its arguments: here for each model the rates by (weakly held) arguments.
_Rates = list[tuple["weakref.ref[TrainingArguments]", float | None]]
_head_rates: weakref.WeakKeyDictionary[nn.Module, _Rates] = weakref.WeakKeyDictionary()


def set_head_rate(model: nn.Module, args: TrainingArguments, rate: float | None) -> None:
    """Has the Trainer of `model` and `args` make its optimizer with BitFit's groups, also when it resumes.

    The Trainer looks `args.optim` up in a table of handlers, and takes the groups that a handler returns instead of
    its own. The handler is wrapped once; it acts only for Trainers that were given a rate for the head, so others keep
    their own groups. Without such a rate the Trainer's groups are right as they are.

    Args:
        model (`nn.Module`): The Trainer's model, with a BitFit adapter injected.
        args ([`~transformers.TrainingArguments`]): The Trainer's arguments.
        rate (`float`, *optional*): The head's learning rate; `None` for the Trainer's own groups.

    Raises:
        [`TrainerSetupError`]: This version of transformers has no such table.
    """
    others = [entry for entry in _head_rates.get(model, []) if entry[0]() is not None and entry[0]() is not args]
    _head_rates[model] = [*others, (weakref.ref(args), rate)]
    if rate is None:
        vars(args).pop(_HEAD_RATE, None)
        return
    setattr(args, _HEAD_RATE, rate)
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as handlers
    except ImportError as error:
        raise TrainerSetupError(
            "This version of transformers has no place where a callback could set the head's learning rate. Give the "
            "groups to the Trainer instead: `Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {'params': "
            "bitfit_hf.optimizer_groups(model, learning_rate, head_learning_rate=...)}))`, with a wrapped model."
        ) from error
    handler = handlers.get(args.optim)
    if handler is not None and not hasattr(handler, "_bitfit_wraps"):
        handlers[args.optim] = _with_groups(handler)


def head_rate(model: nn.Module, args: TrainingArguments) -> float | None:
    """The rate that [`set_head_rate`] was last given for this Trainer."""
    for owner, rate in _head_rates.get(model, []):
        if owner() is args:
            return rate
    return getattr(args, _HEAD_RATE, None)


def _with_groups(handler: Any) -> Any:
    def with_groups(context: Any) -> tuple[Any, dict[str, Any]]:
        optimizer_cls, kwargs = handler(context)
        model, args = context.model, context.args
        if model is not None and is_bitfit(model) and (rate := head_rate(model, args)) is not None:
            kwargs["params"] = optimizer_groups(
                model, args.learning_rate, head_learning_rate=rate, weight_decay=args.weight_decay
            )
        return optimizer_cls, kwargs

    with_groups._bitfit_wraps = handler  # type: ignore[attr-defined]
    return with_groups
