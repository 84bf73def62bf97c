"""One vector for a text: how sentence encoders make it of the vectors of its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub import hf_hub_download

Pooling: TypeAlias = Literal["mean", "cls"]

_FILE = "1_Pooling/config.json"


def embedding(values: dict[str, Any], *, pooling: Pooling, normalize: bool) -> list[float]:
    """The embedding of a text.

    Args:
        values (`dict[str, Any]`): What the backbone returns for it, without padding: `last_hidden_state` of shape
            `[tokens, width]`.
        pooling (`str`): `"mean"` of the tokens, special ones included, or the first token (`"cls"`).
        normalize (`bool`): To length 1.

    Raises:
        `ArithmeticError`: A value is not finite.
    """
    tokens = values["last_hidden_state"].float()
    vector = tokens[0] if pooling == "cls" else tokens.mean(0)
    if normalize:
        vector = torch.nn.functional.normalize(vector, dim=0)
    if not bool(torch.isfinite(vector).all()):
        raise ArithmeticError("An embedding is not finite.")
    return vector.tolist()


def pooling_of(base: str, revision: str | None = None) -> Pooling:
    """What a base says about itself, in the manner of sentence-transformers; the mean where it says nothing."""
    try:
        local = Path(base) / _FILE
        path = local if Path(base).is_dir() else Path(hf_hub_download(base, _FILE, revision=revision))
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or no connection
        return "mean"
    return "cls" if isinstance(config, dict) and config.get("pooling_mode_cls_token") is True else "mean"
