"""How many tokens a model takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")  # what models call theirs
_RESERVED = 2  # rows that some tables have in front of the first position


def most_tokens(model: nn.Module) -> int | None:
    """How many tokens a model takes, by its table of positions or its configuration; `None` where neither says so."""
    return positions_in_table(model) or _configured(model)


def positions_in_table(model: nn.Module) -> int | None:
    """How many tokens a model has absolute positions for; `None` where it looks them up in no table.

    Models in the manner of RoBERTa count from behind the padding id, so of 514 rows they use 512.
    """
    most = _configured(model)
    if most is None:
        return None
    usable = [_usable_rows(path, module, most) for path, module in model.named_modules()]
    return min((rows for rows in usable if rows is not None), default=None)


def _usable_rows(path: str, module: Any, most: int) -> int | None:
    weight = module._parameters.get("weight")
    if path.rpartition(".")[2] not in _TABLES or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    if not most <= len(weight) <= most + _RESERVED:  # of something else, a picture's patches
        return None
    padding = getattr(module, "padding_idx", None)
    return most if padding is None else min(most, len(weight) - padding - 1)


def _configured(model: Any) -> int | None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None  # XLNet says -1: there is no limit
