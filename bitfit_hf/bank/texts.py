"""[`TextEncoder`]: from texts to a model's inputs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import TaskBankError, TextTooLongError
from .positions import Positions


class TextEncoder:
    """A tokenizer, as a bank uses it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The tokenizer; without one there is an error.
        positions ([`Positions`]): How many tokens the model takes.
        device (`torch.device`): Where the model is.
        lock (`threading.Lock`): Held while the tokenizer works: a fast one keeps how to cut in itself, so it refuses a
            second thread ("Already borrowed").

    Raises:
        [`TaskBankError`]: There is no tokenizer, or it cannot pad.
    """

    def __init__(self, tokenizer: Any, positions: Positions, device: torch.device, lock: threading.Lock) -> None:
        if tokenizer is None:
            raise TaskBankError("The bank has no tokenizer: make it with one, or pass encoded inputs to `bank(...)`.")
        if tokenizer.pad_token is None:
            raise TaskBankError("The tokenizer has no padding token: set one (`tokenizer.pad_token = ...`).")
        self.tokenizer = tokenizer
        self.longest = positions.longest_text(tokenizer)
        self.device = device
        self._lock = lock

    def encode(self, number: int, text: str | Sequence[str], *, question: bool, truncate: bool = True) -> Any:
        """The tokens of a text.

        Args:
            number (`int`): Which of the texts of a request it is, for messages.
            text (`str`): A text, or a pair.
            question (`bool`): Whether it is a question and its context, of which only the context may be cut.
            truncate (`bool`, *optional*, defaults to `True`): Cuts a text that is longer than the model takes.

        Raises:
            [`TaskBankError`]: There is nothing to answer from.
            [`TextTooLongError`]: It would have to be cut.
        """
        parts = (text,) if isinstance(text, str) else tuple(text)
        if question:
            self._check_question(number, parts)
        cut = truncate and self.longest is not None
        with self._lock:
            encoding = self.tokenizer(
                *parts,
                truncation=("only_second" if question else True) if cut else False,
                max_length=self.longest if cut else None,
                return_offsets_mapping=self.tokenizer.is_fast,
                return_special_tokens_mask=True,
            )
        tokens = len(encoding["input_ids"])
        if self.longest is not None and tokens > self.longest:
            raise TextTooLongError(
                f"texts[{number}] has {tokens} tokens, and the model takes {self.longest}. Shorten it, or have it cut."
            )
        if not encoding["input_ids"]:
            raise TaskBankError(f"texts[{number}] ({text!r:.80}) has no tokens, so there is nothing to answer from.")
        if question and 1 not in encoding.sequence_ids():
            raise TaskBankError(
                f"The context of texts[{number}] ({text[1]!r:.80}) is empty: there is no answer in it."
            )
        return encoding

    def _check_question(self, number: int, parts: Sequence[str]) -> None:
        if not self.tokenizer.is_fast:
            raise TaskBankError("Answers are cut out of the text, which takes a fast tokenizer (`use_fast=True`).")
        if len(parts) != 2:
            raise TaskBankError(
                f"Question answering takes pairs `(question, context)`, got one text {parts[0]!r:.80} "
                f"(texts[{number}])."
            )
        with self._lock:
            length = len(self.tokenizer(parts[0], add_special_tokens=False)["input_ids"])
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        if self.longest is not None and length + special >= self.longest:
            raise TaskBankError(
                f"The question of texts[{number}] takes {length} tokens and {special} special ones, and the model "
                f"takes {self.longest} in all, so nothing of the context would be read. Shorten the question "
                f"({parts[0]!r:.80})."
            )

    def padded(self, encodings: Sequence[Mapping[str, Any]], *, side: str | None, length: int | None = None) -> Any:
        """A batch for the model, padded on a side to the longest text or to a length."""
        names = [name for name in self.tokenizer.model_input_names if name in encodings[0]]
        features = [{name: encoding[name] for name in names} for encoding in encodings]
        padding = True if length is None else "max_length"
        batch = self.tokenizer.pad(features, padding, length, padding_side=side, return_tensors="pt")
        return batch.to(self.device)
