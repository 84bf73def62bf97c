"""What `/info` says: the fields of Text Embeddings Inference, and no path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import __version__
from .engine import Engine


def info_of(engine: Engine) -> dict[str, Any]:
    """The model and the limits of a server. Of a local folder the last part of its path is told."""
    settings, bank = engine.settings, engine.bank
    local = Path(settings.base).is_dir()
    return {
        "model_id": Path(settings.base).resolve().name if local else settings.base,
        "model_sha": bank.base_revision,
        "model_dtype": bank.base_dtype,
        "model_type": {"embedding": {"pooling": engine.pooling}},
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_input_length": bank.max_length,
        "max_batch_tokens": settings.max_batch_tokens,
        "max_batch_requests": settings.max_batch_requests,
        "max_client_batch_size": settings.max_client_batch_size,
        "auto_truncate": settings.auto_truncate,
        "tokenization_workers": 1,
        "version": __version__,
        "tasks": len(engine.tasks),
    }
