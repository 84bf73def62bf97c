"""The ledger of deltas that are written into a stock model: which they are, and what they were written over.

Whatever is applied or removed, the model's biases are formed anew from the base's own, see
[`bitfit_hf.terms.base_bias`]. The user may change the model in between, most of all load a state dict. So what the
ledger wrote is compared with what is there: if all of it is gone, the ledger starts anew, and if a part is, that is an
error.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..backends.sharded import is_sharded
from ..errors import AddedTokensError, DeltaMismatchError, MergeError, collect
from ..terms import Bias
from ..terms.base_bias import Found, add_deltas, base_bias, forget, found, overwritten, put_back, tells, write_over
from ..terms.structure import stock_root, walk
from ..terms.token_tensors import check_room
from ..tuner.added_tokens import AddedTokens, fit_added_tokens
from ..tuner.head import Labels, float32_copy, resized
from ..tuner.layer import reads_bias, span_index
from ..tuner.places import find_labels, find_places
from ..tuner.token_rows import added_shapes
from .applied_rows import AppliedRows, RowRecord

Part = nn.Module | nn.Parameter  # of a head, see `bitfit_hf.terms.head_modules`


@dataclass(frozen=True, eq=False)
class AppliedDelta:
    """What one delta writes into a model.

    Args:
        digest (`str`): Tells it from others.
        name (`str`): Of its base, for messages.
        biases (`Mapping[str, list[Bias]]`): What it tunes, by the name of the tensor.
        deltas (`Mapping[str, torch.Tensor]`): `δ` by the same names.
        head (`Mapping[str, Mapping[str, torch.Tensor]]`): For each part of the head its tensors, by their names in it;
            that of a parameter is empty.
        labels ([`Labels`], *optional*): Those of the head.
        added ([`AppliedRows`], *optional*): Those of added tokens.
    """

    digest: str
    name: str | None
    biases: Mapping[str, list[Bias]]
    deltas: Mapping[str, torch.Tensor]
    head: Mapping[str, Mapping[str, torch.Tensor]]
    labels: Labels | None
    added: AppliedRows | None = None


class Ledger:
    """The deltas that are written into one stock model.

    Args:
        root (`nn.Module`): The stock model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)
        self.applied: list[AppliedDelta] = []
        self._own: dict[str, Part] = {}  # parts of the model's own head, where a delta's stand in their place
        self._rows = RowRecord()
        self._labels = _labels_of(root)

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
        base_rows = None if tokens is None else tokens.base_rows
        for bias in find_places(model, biases, list(delta.head), base=delta.name, base_rows=base_rows):
            layer = layers[bias.module]
            if not bias.exists and not reads_bias(layer, bias.parameter):
                raise MergeError(
                    f"{bias.module} ({type(layer).__name__}) computes without a bias, so the added one cannot be "
                    "written into it. Load the delta as an adapter instead: `model.load_adapter(...)`."
                )
        labels, problems = self._fit_head(layers, delta)
        if delta.added is not None and tokens is not None:
            check_room(model, tokens.tensors, max(tokens.tensors.rows, tokens.stop))
            problems += _row_problems(delta.added, added_shapes(layers, tokens))
        if problems:
            raise DeltaMismatchError(
                f"This delta does not fit {type(model).__name__}:{collect(problems)}\n"
                f"It was trained on {delta.name!r}; load it onto the same class of model."
            )
        self._check_values_at_hand(layers, delta)
        return delta if delta.labels is None else replace(delta, labels=labels)

    def _fit_head(self, layers: Mapping[str, nn.Module], delta: AppliedDelta) -> tuple[Labels | None, list[str]]:
        parts = {path: _part(self.root, path) for path in delta.head}
        missing = [path for path, part in parts.items() if part is None]
        if missing:
            name = type(self.root).__name__
            return None, [f"the head's {path} has no place: {name} has no such layer" for path in missing]
        known = delta.labels
        if known is None:
            labels, logits = find_labels(self.root, list(delta.head))
        else:
            labels, logits = find_labels(
                self.root, list(delta.head), known.num_labels, known.id2label, known.problem_type
            )
        problems = []
        for path, tensors in delta.head.items():
            size = labels.num_labels if labels is not None and path == logits else None
            own = _state(parts[path] if path not in layers else float32_copy(layers[path], size))  # type: ignore[arg-type]
            if own.keys() != tensors.keys():
                problems.append(f"the head's {path} holds {sorted(tensors)}, the model's {sorted(own)}")
                continue
            problems += [
                f"the head's {path} has another shape than the model's: {key} {list(tensors[key].shape)} instead of "
                f"{list(own[key].shape)}"
                for key in own
                if own[key].shape != tensors[key].shape
            ]
        return labels, problems

    def _check_values_at_hand(self, modules: Mapping[str, nn.Module], delta: AppliedDelta) -> None:
        owners = {group[0].module for group in delta.biases.values()}
        owners |= {path if path in modules else path.rpartition(".")[0] for path in delta.head}
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
        before = (self._headed(), self._enlarged())
        self.applied.append(delta)
        self._write(layers, before)
        LEDGERS[self.root] = self

    def remove(self, delta: AppliedDelta, layers: Mapping[str, nn.Module]) -> None:
        """Takes `delta` out of the model."""
        before = (self._headed(), self._enlarged())
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
        headed = self._headed()
        if headed is not None:
            fits = True
            for path, own in self._own.items():
                part = _part(self.root, path)
                assert part is not None  # the delta was written into it
                if _holds(part, headed.head.get(path, {})):
                    _put(self.root, path, own)
                else:
                    fits = fits and _shapes(part) == _shapes(own)
            if fits and self._labels is not None and _labels_of(self.root) == headed.labels:
                self._labels.give_to(self.root)  # type: ignore[arg-type]  # only a PreTrainedModel has labels
        self._rows.start_anew(self.root)
        self.applied.clear()
        self._own.clear()
        self._labels = _labels_of(self.root)
        LEDGERS.pop(self.root, None)

    def _write(self, layers: Mapping[str, nn.Module], before: tuple[AppliedDelta | None, AppliedDelta | None]) -> None:
        """Writes the sum of the deltas over the base, and the last head and rows of added tokens, where they are no
        longer those of the deltas `before`."""
        with torch.no_grad():
            for name in self._names():
                path, _, parameter = name.rpartition(".")
                write_over(layers[path], parameter, self._sum(name, layers[path], parameter))
        headed, enlarged = self._headed(), self._enlarged()
        if enlarged is not before[1]:
            self._rows.write(self.root, None if enlarged is None else enlarged.added)
        if headed is before[0]:
            return
        for path, own in self._own.items():
            _put(self.root, path, own)
        if headed is not None:
            for path, tensors in headed.head.items():
                part = _part(self.root, path)
                assert part is not None  # `check` has seen to it
                _put(self.root, path, _tuned_part(self._own.setdefault(path, part), tensors))
        if self._labels is not None:
            given = None if headed is None else headed.labels
            (given or self._labels).give_to(self.root)  # type: ignore[arg-type]  # only a PreTrainedModel has labels

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

    def _headed(self) -> AppliedDelta | None:
        return next((delta for delta in reversed(self.applied) if delta.head), None)

    def _enlarged(self) -> AppliedDelta | None:
        return next((delta for delta in reversed(self.applied) if delta.added is not None), None)


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


def _part(root: nn.Module, path: str) -> Part | None:
    parent, _, name = path.rpartition(".")
    owner = dict(walk(root)).get(parent)
    if owner is None:
        return None
    module = owner._modules.get(name)
    return owner._parameters.get(name) if module is None else module


def _put(root: nn.Module, path: str, part: Part) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, part)


def _state(part: Part) -> dict[str, torch.Tensor]:
    return {"": part} if isinstance(part, nn.Parameter) else part.state_dict()


def _holds(part: Part, tensors: Mapping[str, torch.Tensor]) -> bool:
    own = _state(part)
    return own.keys() == tensors.keys() and all(
        own[key].shape == value.shape and torch.equal(own[key], value.to(own[key])) for key, value in tensors.items()
    )


def _shapes(part: Part) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _state(part).items()}


def _output_axis(leaf: nn.Module) -> int:
    return 1 if isinstance(leaf, Conv1D) else 0


def _tuned_part(leaf: Part, tensors: Mapping[str, torch.Tensor]) -> Part:
    """A copy of the model's own leaf or parameter, with the delta's tensors in the model's dtype."""
    if isinstance(leaf, nn.Parameter):
        return nn.Parameter(tensors[""].to(leaf, copy=True), requires_grad=leaf.requires_grad)
    own = leaf.state_dict()
    clone: nn.Module
    if any(own[key].shape != tensor.shape for key, tensor in tensors.items()):
        assert isinstance(leaf, (nn.Linear, Conv1D))  # `fit` has let no other kind pass
        clone = resized(leaf, tensors["weight"].shape[_output_axis(leaf)]).to(own["weight"].dtype)
    else:
        clone = copy.deepcopy(leaf)
    clone.load_state_dict(dict(tensors))
    return clone.train(leaf.training)


def _labels_of(model: nn.Module) -> Labels | None:
    if isinstance(model, PreTrainedModel) and getattr(model.config, "id2label", None):
        return Labels.of(model)
    return None
