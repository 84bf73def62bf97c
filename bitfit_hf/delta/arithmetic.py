"""Calculating with deltas: multiples, sums and differences, and what their configurations then say."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ..config import BitFitConfig
from ..errors import BaseModelMismatchError, DeltaMismatchError, collect
from ..storage.bias_layout import decode_layout
from ..storage.files import digest
from ..storage.fingerprint import differing
from ..terms.tasks import task_type_without_head
from ..tuner.lifecycle import begin_anew
from .parts import DeltaParts, grouped


def scaled(delta: DeltaParts, factor: float) -> DeltaParts:
    """`factor * delta`, with its head and added tokens."""
    tensors = {name: tensor * factor for name, tensor in delta.tensors.items()}
    return _parts(tensors, _config(delta.config, head_of=delta), delta.head, delta.added)


def combined(delta: DeltaParts, other: DeltaParts, sign: float) -> DeltaParts:
    """`delta + sign * other`. What only one of them tunes counts as zero in the other.

    Raises:
        [`BaseModelMismatchError`]: They belong to different bases.
        [`DeltaMismatchError`]: They tune different slices of a vector, or have added tokens of their own.
    """
    check_same_base(delta.config, other.config)
    spans, others = (
        {name: [bias.spans for bias in group] for name, group in grouped(decode_layout(c.bias_layout or {})).items()}
        for c in (delta.config, other.config)
    )
    problems = [
        f"{name}: other terms of the fused vector are tuned"
        for name in spans
        if name in others and spans[name] != others[name]
    ]
    if problems:
        raise DeltaMismatchError(f"These deltas do not tune the same slices:{collect(problems)}")
    if delta.added and other.added and digest(delta.added) != digest(other.added):
        raise DeltaMismatchError(
            f"These deltas have added tokens of their own ({delta.config.added_tokens} and "
            f"{other.config.added_tokens}), and a token has one embedding: they cannot be added."
        )
    tensors = {
        name: tensor + sign * other.tensors[name] if name in other.tensors else tensor
        for name, tensor in delta.tensors.items()
    }
    tensors |= {name: sign * tensor for name, tensor in other.tensors.items() if name not in delta.tensors}
    same = delta.head.keys() == other.head.keys() and all(
        torch.equal(tensor, other.head[name]) for name, tensor in delta.head.items()
    )
    keeper = delta if same or not other.head else other if not delta.head else None
    config = _config(delta.config, head_of=keeper)
    _join(config, delta.config, other.config)
    tokens = delta if delta.added else other
    config.added_tokens, config.base_vocab_size = tokens.config.added_tokens, tokens.config.base_vocab_size
    return _parts(tensors, config, keeper.head if keeper else {}, tokens.added)


def check_same_base(config: BitFitConfig, other: BitFitConfig) -> None:
    """Raises [`BaseModelMismatchError`] where two deltas belong to different bases, by their fingerprints."""
    mine, theirs = config.base_fingerprint, other.base_fingerprint
    found, comparable = differing(mine, theirs) if mine and theirs else ([], False)
    names = [config.base_model_name_or_path, other.base_model_name_or_path]
    if found or (not comparable and names[0] != names[1]):
        raise BaseModelMismatchError(
            f"These deltas belong to different bases ({names[0]} and {names[1]}), so they cannot be calculated "
            f"with:{collect([f'{name} differs' for name in found] or ['they share no tensor'])}"
        )


def _config(like: BitFitConfig, *, head_of: DeltaParts | None) -> BitFitConfig:
    """A configuration for a new delta on the same base, with the head of `head_of`."""
    config = copy.deepcopy(like)
    begin_anew(config)
    keeper = head_of.config if head_of is not None and head_of.head else None
    for name in ("modules_to_save", "num_labels", "id2label", "problem_type"):
        setattr(config, name, copy.deepcopy(getattr(keeper, name, None)))
    config.task_type = like.task_type if head_of is None else head_of.config.task_type
    if not config.modules_to_save:
        config.task_type = task_type_without_head(config.task_type)
    return config


def _join(config: BitFitConfig, one: BitFitConfig, other: BitFitConfig) -> None:
    """Makes `config` say that what either of two deltas tunes is tuned."""
    config.bias_layout = {**(other.bias_layout or {}), **(one.bias_layout or {})}
    mine, theirs = one.base_fingerprint, other.base_fingerprint
    if mine and theirs:
        config.base_fingerprint = {**mine, "tensors": {**theirs["tensors"], **mine["tensors"]}}
    terms = [name for each in (one, other) for name in _listed(each.bias_terms)]
    config.bias_terms = "all" if "all" in terms else list(dict.fromkeys(terms))
    config.add_missing_biases = one.add_missing_biases or other.add_missing_biases
    for name in ("target_modules", "exclude_modules", "layers_to_transform"):
        if getattr(one, name) != getattr(other, name):
            setattr(config, name, None)


def _parts(
    tensors: Mapping[str, torch.Tensor],
    config: BitFitConfig,
    head: Mapping[str, torch.Tensor],
    added: Mapping[str, torch.Tensor],
) -> DeltaParts:
    copies = [{name: tensor.clone() for name, tensor in group.items()} for group in (tensors, head, added)]
    return DeltaParts(copies[0], config, copies[1], copies[2])


def _listed(bias_terms: Any) -> list[str]:
    return [bias_terms] if isinstance(bias_terms, str) else list(bias_terms)
