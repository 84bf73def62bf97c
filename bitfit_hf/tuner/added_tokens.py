"""The tokens that were added for a task: how many they are, and where they belong in a model.

Whoever adds tokens to a tokenizer calls `model.resize_token_embeddings(len(tokenizer))` before training. The rows that
this appends belong to the task as its head does: no checkpoint has them. How many they are is found out from the
`config.json` of the checkpoint that the model was loaded from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..config import BitFitConfig
from ..errors import AddedTokensError
from ..storage.base_commit import cached_commits
from ..terms import Bias
from ..terms.structure import stock_root, walk
from ..terms.token_tensors import SAVE_FIRST, TokenTensors, size_in, token_tensors, vocabulary_size, was_resized


@dataclass(frozen=True)
class AddedTokens:
    """Which of a model's tokens its checkpoint does not have.

    Args:
        start (`int`): How many tokens the checkpoint has: the number of the first new one.
        count (`int`): How many are new.
        tensors ([`TokenTensors`]): Where they are in the model.
        makes_logits (`bool`): Whether the model also answers with one score per token, as language models do.
    """

    start: int
    count: int
    tensors: TokenTensors
    makes_logits: bool

    @property
    def stop(self) -> int:
        """The number behind the last new token."""
        return self.start + self.count

    @property
    def base_rows(self) -> dict[str, int]:
        """For each parameter with a row or entry per token: how many of them, from the first, are the checkpoint's."""
        return dict.fromkeys(self.tensors.names, self.start)

    def in_base(self, biases: Iterable[Bias]) -> list[Bias]:
        """The biases as the checkpoint has them, with an entry for each of its tokens and no more."""
        return [self._cut(bias, self.start) for bias in biases]

    def in_model(self, biases: Iterable[Bias]) -> list[Bias]:
        """The biases as they are tuned in a model with room for the new tokens, whose entries are kept whole."""
        return [self._cut(bias, max(self.tensors.rows, self.stop)) for bias in biases]

    def _cut(self, bias: Bias, size: int) -> Bias:
        return replace(bias, shape=(size,), spans=((0, self.start),)) if bias.name in self.tensors.names else bias


def find_added_tokens(model: nn.Module, given: int | None) -> AddedTokens | None:
    """Finds out which tokens of a model about to be tuned are new, by comparing it with its checkpoint.

    Args:
        model (`nn.Module`): The base, perhaps with adapters injected already.
        given (`int`, *optional*): How many there are by the user's word. Needed where no checkpoint is at hand.

    Returns:
        [`AddedTokens`], or `None` where there are none. Without a checkpoint, as of a model that was made from a
        configuration, there are none where no resize has left a trace.

    Raises:
        [`AddedTokensError`]: It cannot be found out, contradicts what was given, or cannot be tuned.
    """
    root = stock_root(model)
    now = vocabulary_size(root)
    if now is None:
        if given:
            raise AddedTokensError(
                f"`added_tokens` is {given}, but {type(root).__name__} has no vocabulary. Leave it out."
            )
        return None
    assert isinstance(root, PreTrainedModel)
    known = _vocabulary_of_checkpoint(root, now)
    if known is None:
        if given is None and was_resized(root):
            raise AddedTokensError(
                f"`resize_token_embeddings` was called on this {type(root).__name__} (its token embeddings have {now} "
                "rows), and the config.json that would tell how many of them are new is not at hand: the model was "
                f"loaded from {root.name_or_path or 'a configuration'!r}. Say it, `BitFitConfig(added_tokens=…)`; 0 "
                "if all rows belong to the base."
            )
        count = given or 0
    else:
        count = now - known
        _check_count(root, count, known, given)
    if count == 0:
        return None
    tensors = token_tensors(root)
    start = tensors.rows - count
    if start < 1:
        raise AddedTokensError(f"`added_tokens` is {count}, but {type(root).__name__} has {tensors.rows} token rows.")
    _check_kept(root, tensors)
    return _added(root, tensors, start, count)


def fit_added_tokens(model: nn.Module, start: int, count: int, *, others: bool = False) -> AddedTokens:
    """Says where the new tokens of a saved delta belong in a model, which may lack room for them as yet.

    Args:
        model (`nn.Module`): A base, as it was loaded or resized already.
        start (`int`), count (`int`): How many tokens the delta's base has, and how many are new.
        others (`bool`, *optional*, defaults to `False`): Whether the model serves other deltas as well.

    Returns:
        [`AddedTokens`]. [`set_rows`] makes the room.

    Raises:
        [`AddedTokensError`]: The model has fewer tokens than the delta's base, or makes a score for each of another
            number of tokens, or cannot be resized.
    """
    root = stock_root(model)
    if vocabulary_size(root) is None:
        raise AddedTokensError(f"The delta has {count} added tokens, but {type(root).__name__} has no vocabulary.")
    tensors = token_tensors(root)
    if tensors.rows < start:
        raise AddedTokensError(
            f"The delta has {count} tokens added to the {start} of its base, but this {type(root).__name__} has only "
            f"{tensors.rows}. Load the base as it is, without resizing it: that is done here."
        )
    added = _added(root, tensors, start, count)
    if added.makes_logits and tensors.rows != added.stop and (others or tensors.rows > added.stop):
        raise AddedTokensError(
            f"This {type(root).__name__} makes a score for each of {tensors.rows} tokens, the delta one for each of "
            f"{added.stop}; one model answers with one vocabulary. Load the delta onto a base of its own."
        )
    return added


def placed_tokens(model: nn.Module, config: BitFitConfig, *, others: bool = False) -> AddedTokens | None:
    """Says where the new tokens that the configuration of a saved delta counts belong in a model.

    Args:
        model (`nn.Module`): As for [`fit_added_tokens`].
        config ([`BitFitConfig`]): The delta's.
        others (`bool`, *optional*, defaults to `False`): As for [`fit_added_tokens`].

    Returns:
        [`AddedTokens`], or `None` where there are none.

    Raises:
        [`AddedTokensError`]: They do not fit the model.
    """
    if not config.added_tokens:
        return None
    assert config.base_vocab_size is not None  # checked when the configuration was made
    return fit_added_tokens(model, config.base_vocab_size, config.added_tokens, others=others)


def base_rows_of(model: nn.Module, config: BitFitConfig) -> dict[str, int]:
    """[`AddedTokens.base_rows`] of a saved delta in a model; empty where no tokens were added for it."""
    tokens = placed_tokens(model, config)
    return {} if tokens is None else tokens.base_rows


def _added(root: PreTrainedModel | nn.Module, tensors: TokenTensors, start: int, count: int) -> AddedTokens:
    modules = dict(walk(root))
    makes_logits = any(isinstance(modules[path], nn.Linear) for paths in tensors.weights for path in paths)
    return AddedTokens(start, count, tensors, makes_logits)


def _check_count(root: PreTrainedModel, count: int, known: int, given: int | None) -> None:
    now = known + count
    if count < 0:
        raise AddedTokensError(
            f"The token embeddings of this {type(root).__name__} were cut from {known} rows, which its checkpoint "
            f"({root.name_or_path!r}) has, to {now}. A delta cannot say which tokens are gone. {SAVE_FIRST}"
        )
    if given not in (None, count):
        raise AddedTokensError(
            f"`added_tokens` is {given}, but this {type(root).__name__} has {now} token rows and its checkpoint "
            f"({root.name_or_path!r}) has {known}: {count} are new. Leave `added_tokens` out, or start from a fresh "
            f"BitFitConfig.{'' if count == 0 else ' ' + SAVE_FIRST}"
        )


def _check_kept(root: PreTrainedModel, tensors: TokenTensors) -> None:
    """Refuses embeddings of another size than the checkpoint's that transformers did not read but made anew."""
    modules = dict(walk(root))
    marked = [getattr(parameter, "_is_hf_initialized", False) for parameter in root.parameters()]
    embeddings = modules[tensors.weights[0][0]].weight
    if 2 * sum(marked) > len(marked) and not getattr(embeddings, "_is_hf_initialized", False):
        raise AddedTokensError(
            f"The token embeddings of this {type(root).__name__} are not those of its checkpoint "
            f"({root.name_or_path}): all {tensors.rows} rows were made anew when it was loaded with "
            "`ignore_mismatched_sizes`. Load it as it is, then call `model.resize_token_embeddings(len(tokenizer))`."
        )


def _vocabulary_of_checkpoint(root: PreTrainedModel, now: int) -> int | None:
    """How many tokens the checkpoint has that a model was loaded from; `None` where that cannot be found out."""
    sizes: list[int] = []
    name = getattr(root, "name_or_path", None)
    for folder in [Path(name)] if name and os.path.isdir(name) else cached_commits(name):
        try:
            config = type(root.config).from_pretrained(folder)
        except (OSError, ValueError):
            continue
        size = size_in(config)
        if size is not None and size not in sizes and _is_alike(config, root.config):
            sizes.append(size)
    if now in sizes:
        return now
    return sizes[0] if len(sizes) == 1 else _vocabulary_when_made(root)


def _vocabulary_when_made(root: PreTrainedModel) -> int | None:
    """How many tokens a model had when it was made: its inner model may keep the number, which no resize changes."""
    config = root.config.get_text_config()
    inner = [m for m in root.modules() if isinstance(m, PreTrainedModel) and m is not root and m.config is config]
    kept = {vars(module)["vocab_size"] for module in inner if "vocab_size" in vars(module)}
    return kept.pop() if len(kept) == 1 else None


def _is_alike(config: PretrainedConfig, other: PretrainedConfig) -> bool:
    """Whether two configurations are of one model. One from a subfolder has the name of the whole repository."""
    kinds = [(c.model_type, getattr(c.get_text_config(), "hidden_size", None)) for c in (config, other)]
    return kinds[0] == kinds[1]
