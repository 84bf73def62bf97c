"""The heads among what deltas write into a stock model, with their labels.

A head is no difference, so nothing is added up: the model has that of the last delta that brings one. Its own stays
aside, and comes back with the last of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import BitFitConfig
from ..terms import part_of
from ..terms.structure import walk
from ..tuner.head import Labels, float32_copy, resized
from ..tuner.places import find_labels

Part = nn.Module | nn.Parameter  # of a head, see `bitfit_hf.terms.head_modules`


@dataclass(frozen=True, eq=False)
class AppliedHead:
    """What one delta brings for its head.

    Args:
        tensors (`Mapping[str, Mapping[str, torch.Tensor]]`):
            For each part of the head its tensors, by their names in it; that of a parameter is empty.
        labels ([`Labels`], *optional*): What its outputs mean.
    """

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    labels: Labels | None

    @classmethod
    def of(cls, config: BitFitConfig, tensors: Mapping[str, torch.Tensor]) -> AppliedHead | None:
        """That of a delta, in tensors that stay as they are whatever becomes of it; `None` where it has none."""
        names = config.modules_to_save or []
        if not names:
            return None
        parts: dict[str, dict[str, torch.Tensor]] = {path: {} for path in names}
        for name, tensor in tensors.items():
            path = part_of(name, names)
            assert path is not None  # checked when the delta was made
            parts[path][name[len(path) + 1 :]] = tensor.clone()
        labels = None
        if config.num_labels is not None:
            labels = Labels(config.num_labels, dict(config.id2label or {}), config.problem_type)
        return cls(parts, labels)

    def fit(self, root: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[AppliedHead, list[str]]:
        """Compares the head with a model's own.

        Args:
            root (`nn.Module`): The stock model.
            layers (`Mapping[str, nn.Module]`): Its layers by path.

        Returns:
            `tuple[AppliedHead, list[str]]`: The head with complete labels, and what does not fit.
        """
        parts = {path: _part(layers, path) for path in self.tensors}
        missing = [path for path, part in parts.items() if part is None]
        if missing:
            name = type(root).__name__
            return self, [f"the head's {path} has no place: {name} has no such layer" for path in missing]
        known = self.labels
        if known is None:
            labels, logits = find_labels(root, list(self.tensors))
        else:
            labels, logits = find_labels(
                root, list(self.tensors), known.num_labels, known.id2label, known.problem_type
            )
        problems = []
        for path, tensors in self.tensors.items():
            part = parts[path]
            assert part is not None
            if isinstance(part, nn.Module):
                part = float32_copy(part, labels.num_labels if labels is not None and path == logits else None)
            own = _state(part)
            if own.keys() != tensors.keys():
                problems.append(f"the head's {path} holds {sorted(tensors)}, the model's {sorted(own)}")
                continue
            problems += [
                f"the head's {path} has another shape than the model's: {key} {list(tensors[key].shape)} instead of "
                f"{list(own[key].shape)}"
                for key in own
                if own[key].shape != tensors[key].shape
            ]
        return self if known is None else replace(self, labels=labels), problems


class HeadRecord:
    """The head that is written into one stock model, and the model's own that was in its place.

    Args:
        root (`nn.Module`): The stock model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._own: dict[str, Part] = {}
        self._labels = _labels_of(root)

    def write(self, root: nn.Module, head: AppliedHead | None) -> None:
        """Writes a head into a model instead of the one that was written before; without, it gets its own back."""
        for path, own in self._own.items():
            _put(root, path, own)
        if head is not None:
            layers = dict(walk(root))
            for path, tensors in head.tensors.items():
                part = _part(layers, path)
                assert part is not None  # `fit` has seen to it
                _put(root, path, _tuned(self._own.setdefault(path, part), tensors))
        if self._labels is not None:
            labels = (None if head is None else head.labels) or self._labels
            labels.give_to(root)  # type: ignore[arg-type]  # only a PreTrainedModel has labels

    def start_anew(self, root: nn.Module, head: AppliedHead | None) -> None:
        """Forgets `head`, after the user has loaded other values into the model.

        Where it is still there it is taken out. If other values are in its place, these are the model's own; so are
        its labels, unless they are still those of `head` and fit the model's own as well.
        """
        layers = dict(walk(root))
        fits = True
        for path, own in self._own.items():
            part = _part(layers, path)
            assert part is not None  # the head was written into it
            if head is not None and _holds(part, head.tensors.get(path, {})):
                _put(root, path, own)
            else:
                fits = fits and _shapes(part) == _shapes(own)
        if fits and head is not None and self._labels is not None and _labels_of(root) == head.labels:
            self._labels.give_to(root)  # type: ignore[arg-type]  # only a PreTrainedModel has labels
        self._own.clear()
        self._labels = _labels_of(root)


def _part(layers: Mapping[str, nn.Module], path: str) -> Part | None:
    if path in layers:
        return layers[path]
    parent, _, name = path.rpartition(".")
    return layers[parent]._parameters.get(name) if parent in layers else None


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


def _tuned(own: Part, tensors: Mapping[str, torch.Tensor]) -> Part:
    """A copy of the model's own leaf or parameter, with the delta's tensors in the model's dtype."""
    if isinstance(own, nn.Parameter):
        return nn.Parameter(tensors[""].to(own, copy=True), requires_grad=own.requires_grad)
    state = own.state_dict()
    clone: nn.Module
    if any(state[key].shape != tensor.shape for key, tensor in tensors.items()):
        assert isinstance(own, (nn.Linear, Conv1D))  # `fit` has let no other kind pass
        outputs = tensors["weight"].shape[1 if isinstance(own, Conv1D) else 0]
        clone = resized(own, outputs).to(state["weight"].dtype)
    else:
        clone = copy.deepcopy(own)
    clone.load_state_dict(dict(tensors))
    return clone.train(own.training)


def _labels_of(model: nn.Module) -> Labels | None:
    if isinstance(model, PreTrainedModel) and getattr(model.config, "id2label", None):
        return Labels.of(model)
    return None
