"""Which backbones can be exported, and what of their code has to be another for it.

The table holds model types of transformers for which the tests hold an exported graph against the model. Their layers
put the examples first; a type where code reads a bias in another way is prepared for the export here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.deberta_v2 import modeling_deberta_v2

from ...errors import OnnxExportError


def check_type(model: Any) -> None:
    """Says early whether a model can be exported.

    Raises:
        [`OnnxExportError`]: It is of a type that cannot be.
    """
    model_type = model.config.model_type
    if model_type not in _TYPES:
        raise OnnxExportError(
            f"{type(model).__name__} ({model_type}) cannot be exported to ONNX. These model types can: "
            f"{', '.join(sorted(_TYPES))}. `TaskBank(base, tokenizer)` serves this one with torch."
        )


def prepare(backbone: Any) -> None:
    """Makes a backbone ready to be traced with a bias for each example. It is the exporter's own copy."""
    # The other implementations become more nodes (SDPA guards against rows without any token) and are no faster.
    backbone.set_attn_implementation("eager")
    _TYPES[backbone.config.model_type](backbone)


def _nothing(backbone: nn.Module) -> None:
    """For types whose code needs no preparation."""


def _deberta_v2(backbone: nn.Module) -> None:
    if getattr(backbone.encoder, "conv", None) is not None:  # type: ignore[union-attr]
        raise OnnxExportError("A DeBERTa-v2 with a convolution (`conv_kernel_size`) cannot be exported to ONNX.")
    for module in backbone.modules():
        if isinstance(module, modeling_deberta_v2.DisentangledSelfAttention):
            module.disentangled_attention_bias = _PositionScores(module)  # type: ignore[method-assign]


class _PositionScores:
    """DeBERTa-v2's scores of relative positions, for positions that differ between examples.

    The stock code projects one table of positions for all examples. With biases of each example's own, the table and
    its projections have the examples in front: `(batch, 2 · span, width)`.

    Args:
        attention (`nn.Module`): The attention that it is a method of.
    """

    def __init__(self, attention: Any) -> None:
        self._attention = attention

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, relative: torch.Tensor, table: torch.Tensor, factor: int
    ) -> torch.Tensor:
        attention, span = self._attention, self._attention.pos_ebd_size
        table = table if table.dim() == 3 else table.unsqueeze(0)
        table = table[:, : 2 * span]
        scale = math.sqrt(query.shape[-1] * factor)
        size = (query.shape[0], query.shape[1], key.shape[1])
        score = torch.zeros((), dtype=query.dtype)
        if "c2p" in attention.pos_att_type:
            projection = attention.key_proj if attention.share_att_key else attention.pos_key_proj
            found = torch.bmm(query, self._heads(projection, table).transpose(1, 2))
            place = (relative + span).clamp(0, 2 * span - 1)
            score = score + found.gather(-1, place.expand(size)) / scale
        if "p2c" in attention.pos_att_type:
            projection = attention.query_proj if attention.share_att_key else attention.pos_query_proj
            found = torch.bmm(key, self._heads(projection, table).transpose(1, 2))
            place = (span - relative).clamp(0, 2 * span - 1)
            score = score + found.gather(-1, place.expand(size)).transpose(1, 2) / scale
        return score

    def _heads(self, projection: nn.Module, table: torch.Tensor) -> torch.Tensor:
        return self._attention.transpose_for_scores(projection(table), self._attention.num_attention_heads)


_TYPES: dict[str, Callable[[nn.Module], None]] = {
    "bert": _nothing,
    "camembert": _nothing,
    "deberta-v2": _deberta_v2,
    "distilbert": _nothing,
    "electra": _nothing,
    "modernbert": _nothing,
    "mpnet": _nothing,
    "roberta": _nothing,
    "xlm-roberta": _nothing,
}
