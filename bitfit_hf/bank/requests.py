"""What a request to a bank has to look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import TaskBankError


def check_batch(tasks: Any, encoded: Mapping[str, Any]) -> list[str | None]:
    """Checks an encoded batch, and returns the task of each example.

    Raises:
        [`TaskBankError`]: There is no batch, or not one task name per example.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise TaskBankError(f"`tasks` is a list with one name per example, got {tasks!r:.80}.")
    _check_names(tasks)
    if "labels" in encoded:
        raise TaskBankError("A bank computes no loss: leave `labels` out.")
    sizes = {name: len(value) for name, value in encoded.items() if isinstance(value, torch.Tensor) and value.dim()}
    if not sizes:
        raise TaskBankError("There is no batch: pass the tokenizer's output, `bank(**encoded, tasks=[...])`.")
    if not all(sizes.values()) or not tasks:
        raise TaskBankError("The batch is empty: pass at least one example and its task.")
    if set(sizes.values()) != {len(tasks)}:
        counts = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise TaskBankError(
            f"There are {len(tasks)} task names for a batch of another size ({counts}); give one each."
        )
    return list(tasks)


def check_texts(texts: Any, tasks: Any, batch_size: Any) -> tuple[list[Any], list[str | None]]:
    """Checks texts and task names, and returns a list of each.

    Raises:
        [`TaskBankError`]: There are no texts, or they and the names do not go together.
    """
    one_name = tasks is None or isinstance(tasks, str)
    if isinstance(texts, str) and one_name:
        texts = [texts]
    for name, value, allowed in (("texts", texts, False), ("tasks", tasks, one_name)):
        if not allowed and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise TaskBankError(
                "`texts` and `tasks` are lists with one name per text, or one name for all texts, or one text and its "
                f"name; got {name}={value!r:.80} ({type(value).__name__})."
            )
    tasks = [tasks] * len(texts) if one_name else list(tasks)
    _check_names(tasks)
    if len(texts) != len(tasks):
        raise TaskBankError(
            f"There are {len(tasks)} task names for {len(texts)} texts; give one each, or one name for all. Got "
            f"tasks={tasks!r:.80} for texts={texts!r:.80}."
        )
    if not texts:
        raise TaskBankError("There are no texts: pass at least one and its task.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise TaskBankError(f"`batch_size` is a positive number of texts, got {batch_size!r}.")
    for number, text in enumerate(texts):
        pair = isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not (isinstance(text, str) or pair):
            raise TaskBankError(f"A text is a string or a pair of strings, got {text!r:.80} (texts[{number}]).")
    return list(texts), tasks


def _check_names(tasks: Sequence[Any]) -> None:
    wrong = [name for name in tasks if name is not None and not isinstance(name, str)]
    if wrong:
        raise TaskBankError(f"`tasks` holds names and None, got {wrong[0]!r:.80} ({type(wrong[0]).__name__}).")
