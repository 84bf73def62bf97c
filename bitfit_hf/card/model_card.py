"""The model card of a delta: from facts that are known, and nothing else.

[`BitFitCardData`] holds the facts, `model_card_template.md` says how they read, and [`write_card`] puts the card into
a delta's folder. Every way of saving a delta calls it, stock ones included.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..config import BitFitConfig
from ..delta.value import BiasDelta
from ..errors import ConfigError, collect
from ..storage.files import CARD_FILE, write_bytes
from ..terms import SYMBOLS
from ..training_run import TrainingRun
from .card_data import BitFitCardData
from .text import code_text, number_text, plain_text, size_text
from .update import UnreadableCardError, merge_cards, read_card, record_of

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
# Facts that people give, and the key in the header where each is shown.
_KEYS = {
    "language": "language",
    "license": "license",
    "dataset": "datasets",
    "base_model": "base_model",
    "widget": "widget",
}
# What [`BitFitCallback`] and [`push_to_hub`] take as `card`.
FACTS_OF_USERS: dict[str, type | tuple[type, ...]] = {
    "license": str,
    "language": (str, list),
    "dataset": str,
    "dataset_config": str,
    "eval_split": str,
    "widget": list,
}


def make_card(data: BitFitCardData, *, told: Collection[str] = ()) -> ModelCard:
    """Renders a card.

    Args:
        data ([`BitFitCardData`]): The facts.
        told (`Collection[str]`, *optional*): Keys of the header that a person has given, which later saves then keep.

    Returns:
        [`~huggingface_hub.ModelCard`].
    """
    metadata = data.metadata()
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        card=data,
        symbols=SYMBOLS,
        percent=data.percent,
        number=number_text,
        size=size_text,
        md=plain_text,
        code=code_text,
        generated=record_of(metadata.to_dict(), told=set(told)),
    )


def check_card_facts(card: Mapping[str, Any] | None) -> dict[str, Any]:
    """The facts that a user gives for a card, checked.

    Args:
        card (`Mapping[str, Any]`, *optional*): By name, see [`FACTS_OF_USERS`].

    Raises:
        [`ConfigError`]: One is not known, or has the wrong type.
    """
    if card is None:
        return {}
    if not isinstance(card, Mapping):
        raise ConfigError(f"`card` must be a mapping of facts for the model card, got {type(card).__name__}.")
    problems = []
    for name, value in card.items():
        kinds = FACTS_OF_USERS.get(name)
        if kinds is None:
            problems.append(f"{name!r} is none of {', '.join(FACTS_OF_USERS)}")
        elif value is not None and not isinstance(value, kinds):
            problems.append(f"{name!r} is {value!r:.40} ({type(value).__name__})")
    if problems:
        raise ConfigError(f"`card` holds what a model card cannot show:{collect(problems)}")
    return {name: value for name, value in card.items() if value is not None}


def write_card(
    folder: str | os.PathLike[str],
    config: BitFitConfig | None = None,
    *,
    run: TrainingRun | None = None,
    delta: BiasDelta | None = None,
    previous: str | None = None,
    **facts: Any,
) -> Path:
    """Writes or renews the model card in a delta's folder.

    Text that is not between the card's own marks is kept, and so is metadata that somebody else has set. A card that
    PEFT or the Trainer has generated is replaced; one that a person has written, without our marks, keeps its text and
    is only given the metadata that it lacks.

    Args:
        folder (`str` or `os.PathLike`): The delta's folder.
        config ([`BitFitConfig`], *optional*): Of the delta; by default the delta is read from the folder.
        run ([`TrainingRun`], *optional*): The training; by default what the configuration says of it.
        delta ([`BiasDelta`], *optional*): The delta itself, where it is at hand.
        previous (`str`, *optional*): Text of the card before somebody else wrote over it.
        facts: Fields of [`BitFitCardData`] that nobody but the caller knows: `repo_id`, `dataset`, `dataset_config`,
            `eval_split`, `language`, `license`, `widget`, `base_model` (its name on the Hub).

    Returns:
        `Path`: The card.

    Raises:
        [`DeltaIOError`]: The card cannot be written.

    Example:

    ```python
    write_card("rte-bitfit", dataset="nyu-mll/glue", dataset_config="rte", language="en", license="apache-2.0")
    ```
    """
    folder = Path(folder)
    if delta is None and config is None:
        delta = BiasDelta.from_folder(folder)
    if config is None:
        assert delta is not None
        config = delta.config
    path = folder / CARD_FILE
    try:
        old = read_card(path, previous)
    except UnreadableCardError as error:
        logger.warning("%s has not been renewed: %s. Mend or remove it, and save again.", CARD_FILE, error)
        return path
    known = run or config.run
    given = {name: value for name, value in facts.items() if value is not None}
    there = set(old.metadata) if old is not None else set()  # a person may have changed what was told before
    before = {} if known is None else {n: v for n, v in known.card.items() if _KEYS.get(n, n) not in there}
    facts = {**before, **given}
    if old is not None and facts.get("dataset") is None and (known is None or known.dataset is None):
        facts["dataset"] = old.only_dataset()
    data = BitFitCardData.from_config(config, run=run, delta=delta, folder=folder, **facts)
    told = {key for name, key in _KEYS.items() if facts.get(name) is not None}
    if old is not None:
        for key in told:
            old.metadata.pop(key, None)
    write_bytes(path, merge_cards(old, make_card(data, told=told)).encode())
    return path


def card_after_save(folder: str | os.PathLike[str], config: BitFitConfig, delta: BiasDelta | None) -> None:
    """What [`~bitfit_hf.config.after_save`] calls: every way of saving a delta writes its card by this."""
    write_card(folder, config, delta=delta)
