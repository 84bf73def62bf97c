"""What a delta's repository holds: its files are made here, and nothing else is ever pushed."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..card.model_card import write_card
from ..card.update import OldCard, UnreadableCardError, hub_name
from ..delta.lora_export import lora_files
from ..delta.value import BiasDelta
from ..errors import MissingDependencyError, PushError, collect
from ..plot import plot_bias_change
from ..storage.files import CARD_FILE, CONFIG_FILE, LORA_FOLDER, PICTURE_FILE, WEIGHTS_FILE, write_bytes, write_pair

logger = logging.getLogger(__name__)

# What tokenizers and processors write, whatever their kind.
TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
# Left behind by pushes that did not go through this library. Both are pickles.
PICKLES = ("adapter_model.bin", "training_args.bin")
GITIGNORE = ".gitignore"
_RULES_START = "# What a delta's repository holds, and nothing else of a Trainer's folder (bitfit_hf)."
_RULES_END = "# (end of bitfit_hf's rules)"
_RULES = re.compile(rf"{re.escape(_RULES_START)}\n.*?{re.escape(_RULES_END)}\n".encode(), re.DOTALL)
_PICKLE_SUFFIXES = (".bin", ".pickle", ".pkl", ".pt", ".pth", ".ckpt")
_FULL_MODEL = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


@dataclass
class Contents:
    """
    The files of a delta's repository, in memory.

    Args:
        delta ([`BiasDelta`]): What is pushed, under the base's name on the Hub.
        lora (`Mapping[str, bytes]`, *optional*): The files of `stock/` by name.
        tokenizer (`Mapping[str, bytes]`, *optional*): Files of a tokenizer or processor by name.
        card (`bytes`, *optional*): A card that is there already, whose text by its user is kept.
        facts (`Mapping[str, Any]`, *optional*): For the card.
    """

    delta: BiasDelta
    lora: Mapping[str, bytes] = field(default_factory=dict)
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    card: bytes | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def files(self, repo_id: str, *, on_hub: bytes | None = None) -> dict[str, bytes]:
        """Makes the files.

        Args:
            repo_id (`str`): Where they are going to be.
            on_hub (`bytes`, *optional*): The card there at present.

        Returns:
            `dict[str, bytes]`: Content by path in the repository.

        Raises:
            [`PushError`]: One would name a folder of this machine.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            for name, data in self.tokenizer.items():
                write_bytes(folder / name, data)
            for name, data in self.lora.items():
                write_bytes(folder / LORA_FOLDER / name, data)
            write_pair(folder, self.delta.config_values(), self.delta.tensors())
            draw_change(self.delta, folder)
            card = self._renewed_card(folder, repo_id, on_hub)
            files = read_folder(folder) | {CARD_FILE: card}
        _refuse_local_paths(files, on_hub=on_hub or b"")
        return files

    def _renewed_card(self, folder: Path, repo_id: str, on_hub: bytes | None) -> bytes:
        def renewed(old: bytes | None) -> bytes:
            path = folder / CARD_FILE
            path.unlink(missing_ok=True)
            if old is not None:
                write_bytes(path, old)
            return write_card(folder, delta=self.delta, repo_id=repo_id, **self.facts).read_bytes()

        fresh = renewed(None)
        hub, local = (None if old is None else renewed(old) for old in (on_hub, self.card))
        if hub is not None and hub != fresh:  # somebody has written there
            if local not in (None, fresh, hub):
                logger.warning("The card of %s has text of its own, which stays; the folder's card differs.", repo_id)
            return hub
        return local or fresh


def contents_of(
    model_or_delta: nn.Module | BiasDelta | str | os.PathLike[str],
    *,
    base_model: str | None = None,
    stock: bool = False,
    adapter_name: str = "default",
    tokenizer: Any = None,
) -> Contents:
    """Collects what [`bitfit_hf.push_to_hub`] pushes; its arguments are described there."""
    card, tokens = None, {} if tokenizer is None else tokenizer_files(tokenizer)
    if isinstance(model_or_delta, (str, os.PathLike)):
        delta = BiasDelta.from_folder(model_or_delta)
        known = {name: Path(model_or_delta, name) for name in (*TOKENIZER_FILES, CARD_FILE)}
        found = {name: path.read_bytes() for name, path in known.items() if path.is_file()}
        card = found.pop(CARD_FILE, None)
        tokens = tokens or found
        base_model = base_model or _base_on_card(delta, card)
    elif isinstance(model_or_delta, BiasDelta):
        delta = model_or_delta
    elif isinstance(model_or_delta, nn.Module):
        delta = BiasDelta.from_model(model_or_delta, adapter_name)
    else:
        raise PushError(f"Pass a model, a BiasDelta or the folder of one, not a {type(model_or_delta).__name__}.")
    named = with_base_name(delta, base_model)
    lora: Mapping[str, bytes] = {}
    if stock:
        source = model_or_delta if isinstance(model_or_delta, nn.Module) else delta
        lora = lora_files(source, adapter_name=adapter_name, named=named.config)
    return Contents(named, lora=lora, tokenizer=tokens, card=card)


def _base_on_card(delta: BiasDelta, card: bytes | None) -> str | None:
    """The base's name on the Hub that somebody has written on the card of a delta that knows a local path only."""
    name = delta.config.base_model_name_or_path
    if card is None or not name or (is_repo_id(name) and not os.path.isdir(name)):
        return None
    try:
        written = OldCard.parse(card.decode("utf-8", errors="replace")).metadata.get("base_model")
    except UnreadableCardError:
        return None
    return hub_name(written) if isinstance(written, str) else None


def with_base_name(delta: BiasDelta, base_model: str | None = None) -> BiasDelta:
    """The delta under its base's name on the Hub.

    Args:
        delta ([`BiasDelta`]): Left as it is.
        base_model (`str`, *optional*): The name, in place of the one in the configuration.

    Raises:
        [`PushError`]: There is only the path of a local folder, or `base_model` is one.
    """
    name = base_model or delta.config.base_model_name_or_path
    if base_model is not None and not is_repo_id(base_model):
        raise PushError(f"`base_model` is the base's name on the Hub, such as 'user/name', not {base_model!r}.")
    if base_model is None:
        refuse_local_base(name)
    named = copy.copy(delta)
    named.config = copy.deepcopy(delta.config)
    if name != delta.config.base_model_name_or_path:
        named.config.base_model_name_or_path = name
        named.config.revision = None  # a commit of what it was loaded from
    return named


def refuse_local_base(name: str | None) -> None:
    """Raises [`PushError`] where a base is known by the path of a local folder."""
    if name and (not is_repo_id(name) or os.path.isdir(name)):
        raise PushError(
            f"The base was loaded from the local folder {name!r}, which means nothing to others. Give its name on the "
            "Hub: `--base-model user/name` of `bitfit push`, `base_model='user/name'` of `bitfit_hf.push_to_hub`; for "
            "a Trainer's own push, `base_model_name_or_path='user/name'` in the BitFitConfig."
        )


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form of a repo id on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def draw_change(delta: BiasDelta, folder: Path) -> None:
    """Draws the picture that the card shows, where matplotlib is installed."""
    with contextlib.suppress(MissingDependencyError):
        plot_bias_change(delta, folder / PICTURE_FILE)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that a tokenizer or processor saves, by name.

    Raises:
        [`PushError`]: It is none, or one of the files is a pickle.
    """
    if not hasattr(tokenizer, "save_pretrained"):
        raise PushError(f"`tokenizer` has to be a tokenizer or processor, not a {type(tokenizer).__name__}.")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = read_folder(Path(scratch))
    pickles = [name for name in files if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise PushError(
            f"{type(tokenizer).__name__} saves pickles, which a delta's repository never holds:{collect(pickles)}\n"
            "Push without `tokenizer=`."
        )
    return files


def stale_files(present: list[str], new: Mapping[str, bytes]) -> list[str]:
    """Which files of a repository go: what an earlier push left of this one's kind, and pickles beside the delta."""
    gone = [PICTURE_FILE, *PICKLES]
    return [name for name in present if (name in gone or name.startswith(f"{LORA_FOLDER}/")) and name not in new]


def full_model_files(present: list[str]) -> list[str]:
    """The files of a repository that are a whole model's weights."""
    return [name for name in present if _FULL_MODEL.fullmatch(name)]


def gitignore(present: bytes, names: Iterable[str]) -> bytes:
    """A `.gitignore` that lets nothing but a delta's files into a repository.

    Args:
        present (`bytes`): The file as it is; what others wrote into it is kept.
        names (`Iterable[str]`): The tokenizer's files; a `!` in front excludes one of the delta's own.
    """
    mine, theirs = _RULES.search(present), _RULES.sub(b"", present)
    given = list(names)
    allowed = {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, PICTURE_FILE, GITIGNORE, ".gitattributes", f"{LORA_FOLDER}/"}
    allowed |= {name if "/" not in name else f"{name.split('/')[0]}/" for name in given if not name.startswith("!")}
    if mine is not None:  # a later push of other tokenizer files does not shut out the earlier ones
        allowed |= {line[2:] for line in mine.group().decode().splitlines() if line.startswith("!/")}
    allowed -= {name[1:] for name in given if name.startswith("!")}
    rules = [_RULES_START, "/*", *(f"!/{name}" for name in sorted(allowed)), _RULES_END]
    return theirs + b"".join(f"{rule}\n".encode() for rule in rules)


def extended_gitignore(present: bytes, files: Iterable[str]) -> dict[str, bytes]:
    """The `.gitignore` that a Trainer's push has left in a repository, where it would now shut out some of `files`."""
    wanted = gitignore(present, files)
    return {GITIGNORE: wanted} if _RULES.search(present) and wanted != present else {}


def read_folder(folder: Path) -> dict[str, bytes]:
    """All files below `folder` by their path inside it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _refuse_local_paths(files: Mapping[str, bytes], *, on_hub: bytes) -> None:
    """The last line of defence: whatever was written by whom, no folder of this machine leaves it."""
    private = {f"{Path(place)}{os.sep}" for place in (Path.home(), Path.cwd()) if len(Path(place).parts) > 1}
    texts = {name: data for name, data in files.items() if name.endswith(".json") and "vocab" not in name}
    texts.pop("tokenizer.json", None)
    # What the user has written on the Hub is there already.
    texts[CARD_FILE] = b"\n".join(line for line in files.get(CARD_FILE, b"").splitlines() if line not in on_hub)
    problems = [
        f"{name} names {place}"
        for name, data in texts.items()
        for place in sorted(private)
        if place.encode() in data or place.replace("\\", "\\\\").encode() in data
    ]
    if problems:
        raise PushError(
            f"These files would name folders of this machine:{collect(problems)}\n"
            "Take the paths out of the tokenizer, the configuration or the card's text, and push again."
        )
