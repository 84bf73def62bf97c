"""Making a stock Trainer's push carry a delta's files and nothing else.

`trainer.push_to_hub()` and the pushes during training upload the output folder as it is, with `training_args.bin` (a
pickle), logs, and a card of the Trainer's. Two of the stack's habits help, and are used before each push: the Hub
leaves out what a `.gitignore` among the files excludes; and where the card in the folder says `library_name: peft`,
the Trainer lets the model write the last version of the card.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from ..card.model_card import write_card
from ..delta.value import BiasDelta
from ..errors import DeltaIOError, DeltaNotFoundError, PushError
from ..hub.contents import GITIGNORE, TOKENIZER_FILES, draw_change, gitignore, refuse_local_base, tokenizer_files
from ..hub.push import card_on_hub
from ..storage.files import CARD_FILE, write_bytes, write_pair
from ..terms.structure import stock_root
from .checks import adapter_configs, sharding_engine

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..config import BitFitConfig

logger = logging.getLogger(__name__)

_CARD_METHOD = "create_or_update_model_card"


def check_base_name(model: nn.Module, adapter_name: str, config: BitFitConfig | None = None) -> None:
    """Refuses to push an adapter whose base is known by a local path only.

    Args:
        model (`nn.Module`): The Trainer's model, with the adapter or before it is injected.
        adapter_name (`str`): The adapter.
        config ([`BitFitConfig`], *optional*): With which it is going to be injected.

    Raises:
        [`PushError`]: It is.
    """
    known = adapter_configs(model).get(adapter_name, config)
    given = None if known is None else known.base_model_name_or_path
    refuse_local_base(given or getattr(stock_root(model), "name_or_path", None))


def check_card_place(folder: str | os.PathLike[str]) -> None:
    """Refuses a folder where the model card goes: the Trainer and PEFT read the card first, and fail there.

    Args:
        folder (`str` or `os.PathLike`): Where the Trainer is about to save.

    Raises:
        [`DeltaIOError`]: There is one.
    """
    card = Path(folder, CARD_FILE)
    if card.is_dir():
        raise DeltaIOError(f"{card} is a folder, and the model card has to go there. Remove or rename it, then go on.")


def prepare_push(
    model: nn.Module, args: TrainingArguments, adapter_name: str, *, step: int, processing_class: Any = None
) -> None:
    """Prepares the Trainer's output folder for the push that it is about to make.

    Args:
        model (`nn.Module`): The Trainer's model.
        args ([`~transformers.TrainingArguments`]): Its arguments.
        adapter_name (`str`): The adapter that is trained.
        step (`int`): The step that training is at.
        processing_class (*optional*): The Trainer's tokenizer or processor.

    Raises:
        [`PushError`]: The base is known by a local path only.
        [`DeltaIOError`]: There is a folder where the card goes.
    """
    check_base_name(model, adapter_name)
    folder = Path(str(args.output_dir))
    check_card_place(folder)
    names = {*TOKENIZER_FILES, *(tokenizer_files(processing_class) if processing_class is not None else ())}
    local = folder / CARD_FILE
    card = local.read_bytes() if local.is_file() else None
    repo_id = args.hub_model_id or folder.absolute().name
    try:
        repo_id, on_hub = card_on_hub(repo_id, revision=args.hub_revision, token=args.hub_token)
        card = card if on_hub is None else on_hub
    except PushError as error:  # a push is not worth the end of a training
        logger.warning("The card on the Hub cannot be read, so this push leaves it as it is: %s", error)
        names.add(f"!{CARD_FILE}")
    rules = folder / GITIGNORE
    write_bytes(rules, gitignore(rules.read_bytes() if rules.is_file() else b"", names))
    sharded = sharding_engine(args) is not None
    writer = _CardWriter(model, adapter_name, folder, card=card, repo_id=repo_id, sharded=sharded)
    writer.write(folder / f"checkpoint-{step}")
    vars(model)[_CARD_METHOD] = writer


class _CardWriter:
    """
    Stands in for a model's `create_or_update_model_card`, which the Trainer calls last before it pushes.

    Args:
        model (`nn.Module`): The model.
        adapter_name (`str`): The adapter that is pushed.
        folder (`Path`): The Trainer's output folder; cards for others are not ours.
        card (`bytes`, *optional*): The card so far, with its user's text, which the Trainer has overwritten by then.
        repo_id (`str`): Where it is pushed to.
        sharded (`bool`): Whether one process alone cannot read the model's tensors.
    """

    def __init__(
        self, model: nn.Module, adapter_name: str, folder: Path, *, card: bytes | None, repo_id: str, sharded: bool
    ) -> None:
        self.model, self.adapter_name, self.folder = model, adapter_name, folder
        self.card, self.repo_id, self.sharded = card, repo_id, sharded

    def __call__(self, output_dir: str) -> None:
        if Path(output_dir) == self.folder:
            self.write(self.folder)
        elif hasattr(type(self.model), _CARD_METHOD):
            getattr(type(self.model), _CARD_METHOD)(self.model, output_dir)

    def write(self, saved: Path) -> None:
        """Writes the card into the output folder; `saved` is where a sharded model's delta has been saved."""
        if self.sharded:
            try:
                delta = BiasDelta.from_folder(saved)
            except DeltaNotFoundError:  # not saved yet
                write_bytes(self.folder / CARD_FILE, self.card or b"---\nlibrary_name: peft\n---\n")
                return
        else:
            delta = BiasDelta.from_model(self.model, self.adapter_name)
        if isinstance(self.model, PeftModel) and self.adapter_name != "default":
            # PEFT saves it in a folder of its name, which is not where a delta's repository has it.
            write_pair(self.folder, delta.config_values(), delta.tensors())
        draw_change(delta, self.folder)
        previous = None if self.card is None else self.card.decode(errors="replace")
        write_card(self.folder, delta=delta, previous=previous, repo_id=self.repo_id)
