"""Renewing a model card that is there already, without losing what somebody wrote.

A generated card is made of blocks, each between `<!-- bitfit_hf:name -->` and `<!-- /bitfit_hf:name -->`. A block is
ours and is replaced; everything else is kept. Of the header, the note at the top of the card records what was
generated, as short digests, so a value that somebody has changed is known for theirs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id, yaml_dump

_BLOCK = re.compile(
    r"<!-- bitfit_hf:(?P<name>\w+) -->\n(?:(?!<!-- /?bitfit_hf:).)*?<!-- /bitfit_hf:(?P=name) -->\n*", re.DOTALL
)
_RECORD = re.compile(r"generated:(?P<record>(?: [\w-]+=[0-9a-f]{8})*) -->")

# What PEFT adds to the end of every card that it finds in a folder it saves to.
_PEFT_TAIL = re.compile(r"\n*### Framework versions\n\n- PEFT \S+\s*\Z")
# Lines that PEFT adds to the template of huggingface_hub.
_PEFT_LINE = re.compile(r"### Framework versions|- PEFT \S+|## Training procedure")
_QUANTIZATION = "The following `bitsandbytes` quantization config was used during training:"
_TRAINER_COMMENT = (
    "This model card has been generated automatically according to the information the Trainer had access to"
)
# PEFT writes the path that a base was loaded from into this tag.
_PEFT_TAG = "base_model:adapter:"
# What people can have told the Trainer for its card (`trainer.push_to_hub(language=..., license=...)`).
_TOLD_TO_TRAINER = ("language", "license", "datasets")
_TRAINER_TAGS = ("generated_from_trainer", "transformers", "base_model:adapter:")


class UnreadableCardError(ValueError):
    """A card that is there cannot be read. It is left as it is, and a line in the log says so."""


def hub_name(name: str | None) -> str | None:
    """`name` if it can be the name of a repo on the Hub, and is no folder here; else `None`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or Path(name).exists() else name


@dataclass
class OldCard:
    """
    A card that is there.

    Args:
        metadata (`dict[str, Any]`): Its header.
        text (`str`): What comes after the header.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    @classmethod
    def parse(cls, content: str) -> OldCard:
        """Takes a card's text apart.

        Raises:
            [`UnreadableCardError`]: The header is no YAML mapping.
        """
        match = REGEX_YAML_BLOCK.search(content)
        if match is None:
            return cls({}, content)
        try:
            metadata = yaml.safe_load(match.group(2))
        except yaml.YAMLError as error:
            raise UnreadableCardError(f"its header is no valid YAML ({str(error).splitlines()[0]})") from error
        if not isinstance(metadata, dict | None):
            raise UnreadableCardError(f"its header is a {type(metadata).__name__} instead of a mapping")
        return cls({str(key): value for key, value in (metadata or {}).items()}, content[match.end() :])

    @property
    def is_stub(self) -> bool:
        """Whether PEFT or the Trainer has generated it, and nobody has written in it."""
        if _TRAINER_COMMENT in " ".join(self.text.split()):
            return True
        lines = [line for line in self.text.splitlines() if line.strip()]
        quantized = _QUANTIZATION in lines
        return all(
            line in _template_lines()
            or _PEFT_LINE.fullmatch(line)
            or (quantized and (line == _QUANTIZATION or line.startswith("- ")))
            for line in lines
        )

    @property
    def is_ours(self) -> bool:
        """Whether it has blocks that a save may renew."""
        return _BLOCK.search(self.text) is not None

    def is_generated(self, key: str) -> bool:
        """Whether the header's value of `key` is the one that was generated last."""
        match = _RECORD.search(self.text)
        record = dict(pair.split("=") for pair in match["record"].split()) if match else {}
        return key in record and record[key] == _short_digest(self.metadata.get(key))

    def only_dataset(self) -> str | None:
        """The data set, where somebody has named exactly one in the header."""
        value = self.metadata.get("datasets")
        names = value if isinstance(value, list) else [value]
        known = len(names) == 1 and isinstance(names[0], str) and not self.is_generated("datasets")
        return names[0] if known else None


def read_card(path: Path, previous: str | None = None) -> OldCard | None:
    """Reads the card that is to be renewed.

    Args:
        path (`Path`): The card's file.
        previous (`str`, *optional*): Its content before PEFT or the Trainer wrote over it.

    Returns:
        [`OldCard`], or `None` where there is none. Of a generated one only what people told the Trainer is left.

    Raises:
        [`UnreadableCardError`]: It, or its header, cannot be read.
    """
    before = None if previous is None else OldCard.parse(previous)
    if before is not None and before.is_stub:
        before = None
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return before
    except UnicodeDecodeError as error:
        raise UnreadableCardError(f"it is no UTF-8 text ({error})") from error
    except OSError as error:  # a folder, for example
        raise UnreadableCardError(f"it cannot be read ({error})") from error
    card = OldCard.parse(content)
    if not card.is_stub:
        return card
    told = {key: card.metadata[key] for key in _TOLD_TO_TRAINER if card.metadata.get(key)}
    tags = [tag for tag in _listed(card.metadata.get("tags")) if not str(tag).startswith(_TRAINER_TAGS)]
    before = before or OldCard()
    return OldCard({**before.metadata, **told, "tags": [*_listed(before.metadata.get("tags")), *tags]}, before.text)


def record_of(metadata: Mapping[str, Any], *, told: set[str]) -> str:
    """Writes down which values of a header were generated; those that the caller was `told` by a person were not."""
    return "".join(f" {key}={_short_digest(value)}" for key, value in metadata.items() if key not in told)


def merge_cards(old: OldCard | None, new: ModelCard) -> str:
    """Renews a card.

    Args:
        old ([`OldCard`], *optional*): What is there.
        new ([`~huggingface_hub.ModelCard`]): What is to be there.

    Returns:
        `str`: The new card's content.
    """
    if old is None:
        old = OldCard()
    metadata = _merge_metadata(old, new.data.to_dict())
    if old.is_ours:
        text = _merge_text(_PEFT_TAIL.sub("\n", old.text), new.text)
    else:
        text = old.text if old.text.strip() else new.text
    return f"---\n{yaml_dump(metadata, sort_keys=False)}---\n{text}"


def _merge_metadata(old: OldCard, new: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in old.metadata.items() if not old.is_generated(key) and key != "tags"}
    base = kept.get("base_model")
    # The base's name is a fact of the delta, and a path that PEFT wrote is no name.
    if "base_model" in new or not (isinstance(base, str) and hub_name(base)):
        kept.pop("base_model", None)
    if "base_model" not in new and "base_model" not in kept:
        kept.pop("base_model_relation", None)
    tags = [tag for tag in _listed(old.metadata.get("tags")) if not str(tag).startswith(_PEFT_TAG)]
    return {**new, **kept, "tags": list(dict.fromkeys([*new.get("tags", []), *tags]))}


def _merge_text(old: str, new: str) -> str:
    blocks = {match["name"]: match.group().rstrip("\n") for match in _BLOCK.finditer(new)}
    # Take out what is not generated any more, and second copies.
    seen: set[str] = set()

    def once(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in blocks or name in seen:
            return ""
        seen.add(name)
        return blocks[name] + match.group()[len(match.group().rstrip("\n")) :]

    text = _BLOCK.sub(once, old)
    # Put in what is new, each behind the block that comes before it in a fresh card.
    place = 0
    for name, block in blocks.items():
        if name in seen:
            place = text.index(block) + len(block)
        elif place:
            text = f"{text[:place]}\n\n{block}{text[place:]}"
            place += 2 + len(block)
        else:
            text = f"\n{block}\n{text}"
            place = 1 + len(block)
    return text


@cache
def _template_lines() -> frozenset[str]:
    """Lines of the template of huggingface_hub that PEFT saves into every folder."""
    return frozenset(ModelCard.from_template(ModelCardData()).text.splitlines())


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _short_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
