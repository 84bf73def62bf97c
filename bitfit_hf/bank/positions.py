"""How many tokens a model takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")  # what models call theirs
_RESERVED = 2  # rows that some tables have in front of the first position
_NO_LIMIT = 1_000_000  # a tokenizer's `model_max_length` above this says that it does not know


@dataclass(frozen=True)
class Positions:
    """What a model says about the length of its inputs.

    Args:
        in_table (`int`, *optional*):
            How many tokens it has absolute positions for; `None` where it looks them up in no table. Models in the
            manner of RoBERTa count from behind the padding id, so of 514 rows they use 512.
        configured (`int`, *optional*): What its configuration says; `None` where that names no limit.
    """

    in_table: int | None
    configured: int | None

    @classmethod
    def of(cls, model: nn.Module) -> Positions:
        """Looks at a transformers model."""
        config: Any = model.config
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(most, int) or most <= 0:  # XLNet says -1: there is no limit
            return cls(None, None)
        usable = [_usable_rows(path, module, most) for path, module in model.named_modules()]
        return cls(min((rows for rows in usable if rows is not None), default=None), most)

    @property
    def most(self) -> int | None:
        """How many tokens the model takes, as far as it says so."""
        return self.in_table or self.configured

    def longest_text(self, tokenizer: Any) -> int | None:
        """How many tokens a text may have: what the tokenizer says, but no more than there are positions for."""
        own = tokenizer.model_max_length
        if own > _NO_LIMIT:
            return self.most
        return own if self.in_table is None else min(own, self.in_table)


def _usable_rows(path: str, module: Any, most: int) -> int | None:
    weight = module._parameters.get("weight")
    if path.rpartition(".")[2] not in _TABLES or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    if not most <= len(weight) <= most + _RESERVED:  # of something else, a picture's patches
        return None
    padding = getattr(module, "padding_idx", None)
    return most if padding is None else min(most, len(weight) - padding - 1)
