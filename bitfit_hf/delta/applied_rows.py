"""The rows of added tokens among what deltas write into a stock model.

They are whole rows and no differences, so nothing is added up: the model has those of the last delta that brings some.
What was there before is kept here and not by [`bitfit_hf.terms.base_bias`], which keeps whole vectors: of a matrix of
embeddings only the few rows that are written over are worth keeping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..config import BitFitConfig
from ..terms.structure import walk
from ..terms.token_tensors import keep_rows, restore_rows, set_rows
from ..tuner.added_tokens import fit_added_tokens
from ..tuner.token_rows import parameter_of, write_rows


@dataclass(frozen=True, eq=False)
class AppliedRows:
    """What one delta brings for its added tokens.

    Args:
        start (`int`): Number of the first, which is how many tokens the delta's base has.
        count (`int`): How many there are.
        tensors (`Mapping[str, torch.Tensor]`): Their rows and entries, by name in a file.
    """

    start: int
    count: int
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, config: BitFitConfig, tensors: Mapping[str, torch.Tensor]) -> AppliedRows | None:
        """Those of a delta, in tensors that stay as they are whatever becomes of it; `None` where it has none."""
        if not config.added_tokens:
            return None
        assert config.base_vocab_size is not None  # checked when the configuration was made
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return cls(config.base_vocab_size, config.added_tokens, copies)


@dataclass(frozen=True, eq=False)
class _Kept:
    start: int
    own: torch.Tensor  # the model's, which were written over
    written: torch.Tensor


class RowRecord:
    """The rows that are written into one stock model, and the model's own that were in their place."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def write(self, root: nn.Module, rows: AppliedRows | None) -> None:
        """Writes these rows into a model instead of those that were written before; makes the room for them.

        Args:
            root (`nn.Module`): The stock model.
            rows ([`AppliedRows`], *optional*): Without, the model gets its own back.
        """
        self._put_back(root)
        if rows is None:
            return
        tokens = fit_added_tokens(root, rows.start, rows.count)
        set_rows(root, tokens.tensors, max(tokens.tensors.rows, tokens.stop))
        layers = dict(walk(root))
        for name, tensor in rows.tensors.items():
            parameter = parameter_of(layers, name)
            own = parameter.detach()[tokens.start : tokens.stop].clone()
            write_rows(parameter, tokens.start, tensor)
            self._kept[name] = _Kept(tokens.start, own, parameter.detach()[tokens.start : tokens.stop].clone())

    def start_anew(self, root: nn.Module) -> None:
        """Forgets what was written, after the user has loaded other values into the model.

        Rows that are still there are taken out. If others are in the place of some, these are the model's own, and the
        room for them is.
        """
        layers = dict(walk(root))
        here = {name: parameter_of(layers, name).detach() for name in self._kept}
        changed = [
            name
            for name, kept in self._kept.items()
            if not torch.equal(here[name][kept.start : kept.start + len(kept.written)], kept.written.to(here[name]))
        ]
        for name in changed:
            del self._kept[name]
        if changed:
            keep_rows(root)
        self._put_back(root)

    def _put_back(self, root: nn.Module) -> None:
        if not self._kept:
            return
        layers = dict(walk(root))
        for name, kept in self._kept.items():
            write_rows(parameter_of(layers, name), kept.start, kept.own)
        self._kept.clear()
        restore_rows(root)
