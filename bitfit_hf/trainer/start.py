"""What is said when training starts: what is trained, and whether the learning rate makes sense for biases."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn

from ..notices import notice
from ..storage.keys import is_adapters
from ..terms import SYMBOLS, TERMS, pooler_modules
from ..terms.structure import stock_root
from .checks import adapter_configs
from .parameter_groups import trainable_deltas, trainable_head

logger = logging.getLogger(__name__)

# The paper searched the grid 1e-4, 4e-4, 7e-4, 1e-3. A rate for full fine-tuning leaves the biases where they are.
LOWEST_SENSIBLE_RATE = 1e-4


def tell_what_is_trained(model: nn.Module, adapter_name: str) -> None:
    """Says in one line how many parameters are trained of how many, and which terms.

    Args:
        model (`nn.Module`): With the adapter active.
        adapter_name (`str`): The adapter that is going to be trained.
    """
    config = adapter_configs(model)[adapter_name]
    biases = sum(parameter.numel() for parameter in trainable_deltas(model).values())
    head = sum(parameter.numel() for group in trainable_head(model) for parameter in group.values())
    total = sum(p.numel() for name, p in stock_root(model).named_parameters() if not is_adapters(name))
    chosen = config.bias_terms
    terms = "all bias terms" if chosen == "all" else ", ".join(SYMBOLS[term] for term in TERMS if term in chosen)
    pooler = [path for path in pooler_modules(model) if path in (config.modules_to_save or ())]
    beside = f" (with the pooler {', '.join(pooler)}, never trained before)" if pooler else ""
    notice(
        logger,
        f"BitFit trains {biases:,} bias parameters ({terms}) and a head of {head:,}{beside}, of the model's "
        f"{total:,}: {100 * (biases + head) / max(total, 1):.3f} %.",
    )


def warn_of_low_rate(rates: Collection[float], *, warned: list[float]) -> None:
    """Warns, once for each rate, of one with which biases hardly move.

    Args:
        rates (`Collection[float]`): Of the biases' parameter groups.
        warned (`list[float]`): The rates that have been warned of; it is added to.
    """
    low = min(rates, default=LOWEST_SENSIBLE_RATE)
    if 0 < low < LOWEST_SENSIBLE_RATE and low not in warned:
        warned.append(low)
        logger.warning(
            "learning_rate=%g is a rate for full fine-tuning, with which biases hardly move. The BitFit paper "
            "uses 1e-4 to 1e-3, and small models stand 2e-3 and more. Nothing has been changed.",
            low,
        )
