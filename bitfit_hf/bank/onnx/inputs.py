"""Inputs of a backbone to trace and to measure it with."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def token_inputs(model: Any, examples: int, length: int) -> dict[str, torch.Tensor]:
    """A batch of random tokens, always the same one.

    Args:
        model (`PreTrainedModel`): Of text.
        examples (`int`): How many.
        length (`int`): Tokens in each.

    Returns:
        `dict[str, torch.Tensor]`: The arguments of the model's forward that a graph takes, each `(examples, length)`,
        int64.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config
    ids = torch.randint(min(8, config.vocab_size - 1), config.vocab_size, (examples, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    accepted = inspect.signature(type(model).forward).parameters
    # With one type there is nothing to tell apart.
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs
