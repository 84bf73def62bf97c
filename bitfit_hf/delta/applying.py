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
from ..errors import DeltaMismatchError, MergeError, collect
from ..terms import Bias
from ..terms.base_bias import Found, add_deltas, base_bias, forget, found, overwritten, put_back, tells, write_over
from ..terms.structure import stock_root, walk
from ..tuner.head import Labels, float32_copy, resized
from ..tuner.layer import reads_bias, span_index
from ..tuner.places import find_labels, find_places


@dataclass(frozen=True, eq=False)
class AppliedDelta:
    """What one delta writes into a model.

    Args:
        digest (`str`): Tells it from others.
        name (`str`): Of its base, for messages.
        biases (`Mapping[str, list[Bias]]`): What it tunes, by the name of the tensor.
        deltas (`Mapping[str, torch.Tensor]`): `δ` by the same names.
        head (`Mapping[str, Mapping[str, torch.Tensor]]`): For each leaf of the head its tensors.
        labels ([`Labels`], *optional*): Those of the head.
    """

    digest: str
    name: str | None
    biases: Mapping[str, list[Bias]]
    deltas: Mapping[str, torch.Tensor]
    head: Mapping[str, Mapping[str, torch.Tensor]]
    labels: Labels | None


class Ledger:
    """The deltas that are written into one stock model.

    Args:
        root (`nn.Module`): The stock model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)
        self.applied: list[AppliedDelta] = []
        self._leaves: dict[str, nn.Module] = {}  # the model's own, where a delta's stand in their place
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

    def fit(self, delta: AppliedDelta, layers: Mapping[str, nn.Module]) -> AppliedDelta:
        """Raises what is wrong with applying `delta`, before anything is written; returns it with complete labels."""
        model = self.root
        biases = [bias for group in delta.biases.values() for bias in group]
        for bias in find_places(model, biases, list(delta.head), base=delta.name):
            layer = layers[bias.module]
            if not bias.exists and not reads_bias(layer, bias.parameter):
                raise MergeError(
                    f"{bias.module} ({type(layer).__name__}) computes without a bias, so the added one cannot be "
                    "written into it. Load the delta as an adapter instead: `model.load_adapter(...)`."
                )
        labels, problems = self._fit_head(layers, delta)
        if problems:
            raise DeltaMismatchError(
                f"This delta does not fit {type(model).__name__}:{collect(problems)}\n"
                f"It was trained on {delta.name!r}; load it onto the same class of model."
            )
        self._check_values_at_hand(layers, delta)
        return delta if delta.labels is None else replace(delta, labels=labels)

    def _fit_head(self, layers: Mapping[str, nn.Module], delta: AppliedDelta) -> tuple[Labels | None, list[str]]:
        missing = [path for path in delta.head if path not in layers]
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
            own = float32_copy(layers[path], size).state_dict()
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
        owners = {group[0].module for group in delta.biases.values()} | set(delta.head)
        absent = [
            f"{path}.{name} is {'on the meta device' if tensor.is_meta else 'split over devices'}"
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
        before = self._headed()
        self.applied.append(delta)
        self._write(layers, before)
        LEDGERS[self.root] = self

    def remove(self, delta: AppliedDelta, layers: Mapping[str, nn.Module]) -> None:
        """Takes `delta` out of the model."""
        before = self._headed()
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
            for path, own in self._leaves.items():
                leaf = self.root.get_submodule(path)
                if _holds(leaf, headed.head.get(path, {})):
                    _put(self.root, path, own)
                else:
                    fits = fits and _shapes(leaf) == _shapes(own)
            if fits and self._labels is not None and _labels_of(self.root) == headed.labels:
                self._labels.give_to(self.root)  # type: ignore[arg-type]  # only a PreTrainedModel has labels
        self.applied.clear()
        self._leaves.clear()
        self._labels = _labels_of(self.root)
        LEDGERS.pop(self.root, None)

    def _write(self, layers: Mapping[str, nn.Module], before: AppliedDelta | None) -> None:
        """Writes the sum of the deltas over the base, and the last head, where that is no longer that of `before`."""
        with torch.no_grad():
            for name in self._names():
                path, _, parameter = name.rpartition(".")
                write_over(layers[path], parameter, self._sum(name, layers[path], parameter))
        headed = self._headed()
        if headed is before:
            return
        for path, leaf in self._leaves.items():
            _put(self.root, path, leaf)
        if headed is not None:
            for path, tensors in headed.head.items():
                leaf = self._leaves.setdefault(path, self.root.get_submodule(path))
                _put(self.root, path, _head_leaf(leaf, tensors))
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
        dtype = like.dtype if like.dtype.is_floating_point else torch.float32
        return add_deltas(None if base is None else base.to(like.device), parts, dtype=dtype, shape=shape)

    def _headed(self) -> AppliedDelta | None:
        return next((delta for delta in reversed(self.applied) if delta.head), None)


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


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _holds(leaf: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    own = leaf.state_dict()
    return own.keys() == tensors.keys() and all(
        own[key].shape == value.shape and torch.equal(own[key], value.to(own[key])) for key, value in tensors.items()
    )


def _shapes(leaf: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in leaf.state_dict().items()}


def _output_axis(leaf: nn.Module) -> int:
    return 1 if isinstance(leaf, Conv1D) else 0


def _head_leaf(leaf: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the model's own leaf, with the delta's tensors in the model's dtype."""
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
