"""The ledger of deltas that are written into a stock model: which they are, and what they were written over.

Whatever is applied or removed, the model's biases are formed anew from the base's own, see
[`bitfit_hf.terms.base_bias`]. The user may change the model in between, most of all load a state dict. So what the
ledger wrote is compared with what is there: if all of it is gone, the ledger starts anew, and if a part is, that is an
error.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..backends.sharded import is_sharded
from ..errors import AddedTokensError, DeltaMismatchError, MergeError, collect
from ..storage.fingerprint import OnMismatch, check_base
from ..terms import Bias
from ..terms.base_bias import Found, add_deltas, base_bias, forget, found, overwritten, put_back, tells, write_over
from ..terms.structure import stock_root, walk
from ..terms.survey import span_index
from ..terms.token_tensors import check_room
from ..tuner.added_tokens import AddedTokens, fit_added_tokens
from ..tuner.layer_kinds import reads_bias
from ..tuner.places import find_places
from ..tuner.state import is_bitfit
from ..tuner.token_rows import added_shapes
from .applied_head import AppliedHead, HeadRecord
from .applied_rows import AppliedRows, RowRecord


@dataclass(frozen=True, eq=False)
class AppliedDelta:
    """What one delta writes into a model.

    Args:
        digest (`str`): Tells it from others.
        name (`str`): Of its base, for messages.
        biases (`Mapping[str, list[Bias]]`): What it tunes, by the name of the tensor.
        deltas (`Mapping[str, torch.Tensor]`): `δ` by the same names.
        head ([`AppliedHead`], *optional*): Its head.
        added ([`AppliedRows`], *optional*): The rows of its added tokens.
    """

    digest: str
    name: str | None
    biases: Mapping[str, list[Bias]]
    deltas: Mapping[str, torch.Tensor]
    head: AppliedHead | None = None
    added: AppliedRows | None = None


class Ledger:
    """The deltas that are written into one stock model.

    Args:
        root (`nn.Module`): The stock model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)
        self.applied: list[AppliedDelta] = []
        self._head = HeadRecord(root)
        self._rows = RowRecord()

    @property
    def root(self) -> nn.Module:
        """The stock model."""
        root = self._root()
        assert root is not None  # the ledger is kept by the model
        return root

    # --- what is there ---

    def layers(self) -> dict[str, nn.Module]:
        """The model's layers by path, for the methods below. Not kept: a ledger must not keep its model alive."""
        return dict(walk(self.root))

    def is_gone(self, layers: Mapping[str, nn.Module]) -> bool:
        """Whether nothing is left of what was written, and the biases that are there are the base's own.

        Raises:
            [`DeltaMismatchError`]: A part of it is left; or something was written that this ledger knows nothing of.
        """
        left: list[str] = []
        gone: list[str] = []
        names = self._names()
        for name in names:
            path, _, parameter = name.rpartition(".")
            layer = layers.get(path)
            state = None if layer is None else found(layer, parameter)
            if layer is None or state is None or tells(layer, parameter):
                (left if state is Found.WRITTEN else gone).append(name)
        if left and gone:
            raise DeltaMismatchError(
                f"{len(self.applied)} deltas were written into this {type(self.root).__name__}, and a part of its "
                f"biases was changed or loaded afterwards, so neither b_0 nor b_0 + δ is there any more:"
                f"{collect(f'{name} was changed' for name in gone)}\nLoad the base again, with all of its biases."
            )
        foreign = [name for name in overwritten(layers) if name not in names]
        if foreign:
            raise DeltaMismatchError(
                f"This {type(self.root).__name__} holds a delta that was applied to a part of it, or to the model "
                f"that it is a copy of:{collect(foreign)}\nTake it out there first (`delta.remove_`), or load the "
                "base again."
            )
        return bool(gone)

    def _names(self) -> dict[str, None]:
        return dict.fromkeys(name for delta in self.applied for name in delta.deltas)

    # --- checking ---

    def place_tokens(self, delta: AppliedDelta, *, gone: bool) -> AddedTokens | None:
        """Where the added tokens are that the model is going to have: those of `delta`, or of one that it has.

        Args:
            delta ([`AppliedDelta`]): What is about to be applied.
            gone (`bool`): What [`~Ledger.is_gone`] says.

        Raises:
            [`AddedTokensError`]: Those of `delta` do not fit the model, or what is applied to it.
        """
        others = [] if gone else [other.added for other in self.applied if other.added is not None]
        added = delta.added or next(reversed(others), None)
        if added is None:
            return None
        if any(other.start != added.start for other in others):
            raise AddedTokensError(
                f"This delta's tokens were added to a base of {added.start}, those of a delta that is applied to this "
                f"{type(self.root).__name__} to one of {others[0].start}. Load the delta onto a base of its own."
            )
        return fit_added_tokens(self.root, added.start, added.count, others=bool(others))

    def fit(self, delta: AppliedDelta, tokens: AddedTokens | None, layers: Mapping[str, nn.Module]) -> AppliedDelta:
        """Raises what is wrong with applying `delta`, before anything is written; returns it with complete labels.

        Args:
            delta ([`AppliedDelta`]): What is about to be applied.
            tokens ([`AddedTokens`], *optional*): What [`~Ledger.place_tokens`] has found.
            layers (`Mapping[str, nn.Module]`): The model's, see [`~Ledger.layers`].
        """
        model = self.root
        biases = [bias for group in delta.biases.values() for bias in group]
        head = [] if delta.head is None else list(delta.head.tensors)
        base_rows = None if tokens is None else tokens.base_rows
        for bias in find_places(model, biases, head, base=delta.name, base_rows=base_rows):
            layer = layers[bias.module]
            if not bias.exists and not reads_bias(layer, bias.parameter):
                raise MergeError(
                    f"{bias.module} ({type(layer).__name__}) computes without a bias, so the added one cannot be "
                    "written into it. Load the delta as an adapter instead: `model.load_adapter(...)`."
                )
        fitted, problems = (None, []) if delta.head is None else delta.head.fit(model, layers)
        if delta.added is not None and tokens is not None:
            check_room(model, tokens.tensors, max(tokens.tensors.rows, tokens.stop))
            problems += _row_problems(delta.added, added_shapes(layers, tokens))
        if problems:
            raise DeltaMismatchError(
                f"This delta does not fit {type(model).__name__}:{collect(problems)}\n"
                f"It was trained on {delta.name!r}; load it onto the same class of model."
            )
        self._check_values_at_hand(layers, delta)
        return replace(delta, head=fitted)

    def _check_values_at_hand(self, modules: Mapping[str, nn.Module], delta: AppliedDelta) -> None:
        owners = {group[0].module for group in delta.biases.values()}
        head = () if delta.head is None else delta.head.tensors
        owners |= {path if path in modules else path.rpartition(".")[0] for path in head}
        owners |= {name.rpartition(".")[0] for name in (delta.added.tensors if delta.added is not None else ())}
        absent = [
            f"{path}.{name} is {'on the meta device' if tensor.is_meta else 'split over devices'}".removeprefix(".")
            for path in sorted(owners)
            for name, tensor in modules[path].named_parameters(recurse=False)
            if tensor.is_meta or is_sharded(tensor)
        ]
        if absent:
            raise MergeError(
                f"The values of this {type(self.root).__name__} are not at hand, so nothing can be written over them:"
                f"{collect(absent)}\nLoad the model onto its devices, without offloading, and shard it afterwards; or "
                "load the delta as an adapter: `model.load_adapter(...)`."
            )

    # --- writing ---

    def add(self, delta: AppliedDelta, layers: Mapping[str, nn.Module]) -> None:
        """Writes `delta` into the model, beside those that are there."""
        before = (self._last_head(), self._last_rows())
        self.applied.append(delta)
        self._write(layers, before)
        LEDGERS[self.root] = self

    def remove(self, delta: AppliedDelta, layers: Mapping[str, nn.Module]) -> None:
        """Takes `delta` out of the model."""
        before = (self._last_head(), self._last_rows())
        self.applied.remove(delta)
        for name in delta.deltas.keys() - self._names().keys():
            path, _, parameter = name.rpartition(".")
            put_back(layers[path], parameter)
        self._write(layers, before)
        if not self.applied:
            del LEDGERS[self.root]

    def start_anew(self, layers: Mapping[str, nn.Module]) -> None:
        """Forgets deltas that are gone. Their head is taken out where it is still there, and their labels with it."""
        for name in self._names():
            path, _, parameter = name.rpartition(".")
            if path in layers:
                forget(layers[path], parameter)
        self._head.start_anew(self.root, self._last_head())
        self._rows.start_anew(self.root)
        self.applied.clear()
        LEDGERS.pop(self.root, None)

    def _write(self, layers: Mapping[str, nn.Module], before: tuple[AppliedHead | None, AppliedRows | None]) -> None:
        """Writes the sum of the deltas over the base, and the last head and rows of added tokens, where they are no
        longer those of the deltas `before`."""
        with torch.no_grad():
            for name in self._names():
                path, _, parameter = name.rpartition(".")
                write_over(layers[path], parameter, self._sum(name, layers[path], parameter))
        head, rows = self._last_head(), self._last_rows()
        if rows is not before[1]:
            self._rows.write(self.root, rows)
        if head is not before[0]:
            self._head.write(self.root, head)

    def _sum(self, name: str, layer: nn.Module, parameter: str) -> torch.Tensor:
        base, stored = base_bias(layer, parameter), layer._parameters.get(parameter)
        like = layer._parameters["weight"] if stored is None else stored
        assert like is not None
        parts = []
        for delta in self.applied:
            if name in delta.deltas:
                index = span_index(delta.biases[name])
                parts.append((delta.deltas[name].to(like.device), None if index is None else index.to(like.device)))
        shape = next(delta.biases[name][0].shape for delta in self.applied if name in delta.biases)
        if base is not None and base.shape != shape:  # the entries of added tokens come behind the base's
            base = base[: shape[0]]
        dtype = like.dtype if like.dtype.is_floating_point else torch.float32
        return add_deltas(None if base is None else base.to(like.device), parts, dtype=dtype, shape=shape)

    def _last_head(self) -> AppliedHead | None:
        return next((delta.head for delta in reversed(self.applied) if delta.head is not None), None)

    def _last_rows(self) -> AppliedRows | None:
        return next((delta.added for delta in reversed(self.applied) if delta.added is not None), None)


LEDGERS: weakref.WeakKeyDictionary[nn.Module, Ledger] = weakref.WeakKeyDictionary()


def ledger_of(model: nn.Module) -> Ledger:
    """The ledger of a model, a new one where no delta is applied to it."""
    root = stock_root(model)
    return LEDGERS.get(root) or Ledger(root)


def is_applied(model: nn.Module) -> bool:
    """Whether the biases of a stock model are not those of its base, since a delta was written into them."""
    ledger = ledger_of(model)
    layers = ledger.layers()
    return next(overwritten(layers), None) is not None or (bool(ledger.applied) and not ledger.is_gone(layers))


def _row_problems(added: AppliedRows, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    found = {name: tuple(tensor.shape) for name, tensor in added.tensors.items()}
    return [f"{name} of the added tokens has no place" for name in found if name not in wanted] + [
        f"{name} of the added tokens is {found.get(name, 'missing')}, the model needs {shape}"
        for name, shape in wanted.items()
        if found.get(name) != shape
    ]


def apply_delta(
    model: nn.Module, delta: AppliedDelta, *, fingerprint: dict[str, Any] | None, on_base_mismatch: OnMismatch
) -> nn.Module:
    """The work of [`BiasDelta.apply_`].

    Args:
        model (`nn.Module`): A stock model.
        delta ([`AppliedDelta`]): What is written into it.
        fingerprint (`dict`, *optional*): Of the delta's base.
        on_base_mismatch (`str`): `"raise"`, `"warn"` or `"ignore"`.
    """
    if is_bitfit(model):
        raise DeltaMismatchError(
            "The model has BitFit adapters injected, so writing into its biases would change what they belong to. "
            "Load the delta as another adapter (`model.load_adapter`), or apply it to a stock model."
        )
    ledger = ledger_of(model)
    layers = ledger.layers()
    gone = ledger.is_gone(layers)
    tokens = ledger.place_tokens(delta, gone=gone)
    base_rows = None if tokens is None else tokens.base_rows
    check_base(model, fingerprint, delta_base=delta.name, on_mismatch=on_base_mismatch, base_rows=base_rows)
    delta = ledger.fit(delta, tokens, layers)
    if gone:
        ledger.start_anew(layers)
    ledger.add(delta, layers)
    return model


def remove_delta(model: nn.Module, digest: str) -> nn.Module:
    """The work of [`BiasDelta.remove_`]; the last delta of this `digest` is taken out."""
    ledger = ledger_of(model)
    found = next((delta for delta in reversed(ledger.applied) if delta.digest == digest), None)
    if found is None:
        raise DeltaMismatchError(
            "This delta was not applied to this model with `apply_` or `load_delta`, so its base is not known. "
            "Load the base again."
        )
    layers = ledger.layers()
    if ledger.is_gone(layers):
        raise DeltaMismatchError(
            "This delta was applied to this model, but is not there any more: all of its biases were loaded or "
            "changed since then, so there is nothing to take out. Load the base again if these biases are not it."
        )
    ledger.remove(found, layers)
    return model
