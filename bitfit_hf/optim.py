"""Parameter groups for bias-only fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .errors import OptimizerError, collect
from .tuner.state import delta_parameters, head_leaves, tuned_layers


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
    held = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = {id(parameter): name for name, parameter in (deltas | head).items()}

    problems = [f"{name} is not in the optimizer" for key, name in wanted.items() if key not in held]
    problems += [f"{named.get(key, 'a parameter of another model')} is" for key in held if key not in wanted]
    problems += [
        f"{name} is decayed by {held[id(parameter)]['weight_decay']}"
        for name, parameter in deltas.items()
        if held.get(id(parameter), {}).get("weight_decay")
    ]
    if head_learning_rate is not None and not problems:
        problems += _rates(deltas, held, learning_rate, "delta")
        problems += _rates(head, held, head_learning_rate, "head")
    if problems:
        raise OptimizerError(
            "The optimizer does not train the deltas and the head, and them alone:"
            f"{collect(problems)}\n"
            "An optimizer that is passed to the Trainer has to be made from "
            "`bitfit_hf.optimizer_groups(model, learning_rate, …)`, after `model = get_peft_model(model, "
            "BitFitConfig())`."
        )


def _rates(
    parameters: dict[str, nn.Parameter], held: dict[int, dict[str, Any]], rate: float | None, what: str
) -> Iterable[str]:
    # The scheduler keeps the rate that a group began with in `initial_lr`.
    found = {group.get("initial_lr", group["lr"]) for p in parameters.values() for group in [held[id(p)]]}
    if rate is not None and found - {rate}:
        yield f"the {what}'s learning rate is {sorted(found)} instead of {rate}"
