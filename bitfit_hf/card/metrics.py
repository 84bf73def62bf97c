"""What a model card says about results, and fetching the card of a delta on the Hub."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..config import BitFitConfig
from ..storage.files import CARD_FILE
from .card_data import BitFitCardData, metric_words
from .text import titled


def add_card(folder: Path, path_or_repo: str, *, token: str | None = None) -> None:
    """Fetches the card of a delta from the Hub into the `folder` of its other files, if it has one."""
    if Path(path_or_repo).is_dir():
        return
    with suppress(EntryNotFoundError):
        hf_hub_download(path_or_repo, CARD_FILE, revision=folder.name, token=token)


def card_metrics(card: Path) -> list[dict[str, Any]]:
    """The results in the `model-index` of a model card; what cannot be read is left out, with a warning."""
    if not card.is_file():
        return []
    try:
        data: Any = ModelCard(card.read_text(encoding="utf-8")).data
        results = data.eval_results or []
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        warnings.warn(f"The metadata of {card.name} cannot be read ({error}), so no metrics are shown.", stacklevel=2)
        return []
    return [
        {
            "dataset": result.dataset_name or result.dataset_type,
            "split": result.dataset_split,
            "metric": result.metric_name or result.metric_type,
            "value": _plain_value(result.metric_value),
        }
        for result in results
    ]


def known_metrics(config: BitFitConfig, card: Path) -> list[dict[str, Any]]:
    """What is known of a delta's quality: from the facts of its training, which the card quotes, and from the card.

    Args:
        config ([`BitFitConfig`]): Of the delta; its `run` has the metrics of the last evaluation.
        card (`Path`): Where somebody may have added results.
    """
    data = BitFitCardData.from_config(config)
    where = data.evaluated_on or (None, None, None)
    own = [
        {"dataset": titled(where[0], where[1]), "split": where[2], "metric": metric_words(name), "value": value}
        for name, value in data.metrics.items()
    ]
    names = {row["metric"] for row in own}
    return own + [row for row in card_metrics(card) if row["metric"] not in names]


def _plain_value(value: Any) -> Any:
    """What JSON can hold of a value from YAML."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str)) or value is None else str(value)
