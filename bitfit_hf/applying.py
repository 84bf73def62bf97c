"""Writing deltas into a stock model, and taking them out again exactly.

`b_0 + δ − δ` is not `b_0` in floating point. So what a delta is written over is kept, and whatever is applied or
removed, the model's biases are formed anew from that.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import BitFitConfig
from .errors import DeltaMismatchError, MergeError, collect
from .terms import part_of
from .terms.structure import stock_root, walk
from .tuner.head import Labels, resized
from .tuner.layer import reads_bias, span_index

if TYPE_CHECKING:
    from .delta import BiasDelta


Part = nn.Module | nn.Parameter  # of a head, see `bitfit_hf.terms.head_modules`


@dataclass
class Ledger:
    """The base's own tensors while deltas are written over them."""

    model_ref: Any
    applied: list[BiasDelta] = field(default_factory=list)
    biases: dict[str, torch.Tensor | None] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    labels: Labels | None = None

    def __post_init__(self) -> None:
        model = self.model_ref
        self.model_ref = weakref.ref(model)
        self.labels = Labels.of(model) if _has_labels(model) else None

    def check(self, delta: BiasDelta) -> None:
        """Raises what is wrong with applying `delta`, before anything is written."""
        model = self.model_ref()
        modules = dict(walk(stock_root(model)))
        problems = []
        for name, group in delta.biases.items():
            module = modules.get(group[0].module)
            stored = None if module is None else module._parameters.get(group[0].parameter)
            if module is None:
                problems.append(f"{name} has no place: there is no layer {group[0].module}")
            elif stored is None and group[0].exists:
                problems.append(f"{name} does not exist in the model")
            elif stored is None and not reads_bias(module, group[0].parameter):
                raise MergeError(
                    f"{group[0].module} ({type(module).__name__}) computes without a bias, so the added one cannot be "
                    "written into it. Load the delta as an adapter instead: `model.load_adapter(...)`."
                )
            elif stored is not None and tuple(stored.shape) != group[0].shape:
                problems.append(f"{name} has shape {list(group[0].shape)}, the model's {list(stored.shape)}")
        for path, tensors in _by_part(delta).items():
            part = _find(stock_root(model), path)
            if part is None:
                problems.append(f"the head's {path} has no place: {type(model).__name__} has no such layer")
                continue
            own = _state(part)
            if own.keys() != tensors.keys():
                problems.append(f"the head's {path} holds {sorted(tensors)}, the model's {sorted(own)}")
            elif any(own[key].shape != tensors[key].shape for key in own) and not _resizable(part, tensors):
                problems.append(f"the head's {path} has another shape than the model's")
        if problems:
            raise DeltaMismatchError(
                f"This delta does not fit {type(model).__name__}:{collect(problems)}\n"
                f"It was trained on {delta.config.base_model_name_or_path!r}; load it onto the same class of model."
            )

    def write(self) -> None:
        """Writes the sum of the applied deltas over the base, and the last head; with none, the base itself."""
        model = self.model_ref()
        root = stock_root(model)
        modules = dict(walk(root))
        groups = {name: group for delta in self.applied for name, group in delta.biases.items()}
        for name, group in groups.items():
            stored = modules[group[0].module]._parameters.get(group[0].parameter)
            self.biases.setdefault(name, None if stored is None else stored.detach().clone())
        with torch.no_grad():
            for name, base in self.biases.items():
                path, _, parameter = name.rpartition(".")
                self._write_bias(modules[path], parameter, name, base)
        for path, part in self.parts.items():
            _put(root, path, part)
        headed = next((delta for delta in reversed(self.applied) if delta.head), None)
        if headed is not None:
            for path, tensors in _by_part(headed).items():
                found = _find(root, path)
                assert found is not None  # `check` has seen to it
                _put(root, path, _head_part(self.parts.setdefault(path, found), tensors))
        labels = None if headed is None or headed.config.num_labels is None else _labels_of(headed.config)
        if self.labels is not None and isinstance(model, PreTrainedModel):
            (labels or self.labels).give_to(model)

    def _write_bias(self, module: nn.Module, parameter: str, name: str, base: torch.Tensor | None) -> None:
        deltas = [(delta[name], span_index(delta.biases[name])) for delta in self.applied if name in delta]
        stored = module._parameters.get(parameter)
        if not deltas:
            if base is None:
                module._parameters[parameter] = None
            elif stored is not None:
                stored.copy_(base)
            return
        shape = next(d.biases[name][0].shape for d in self.applied if name in d)
        like = module._parameters["weight"] if base is None else base
        assert like is not None
        total = torch.zeros(shape, dtype=torch.float32, device=like.device) if base is None else base
        dtype = like.dtype if like.dtype.is_floating_point else torch.float32
        total = total.to(torch.promote_types(total.dtype, torch.float32))
        for delta, index in deltas:
            here = delta.to(total.device, total.dtype)
            if index is None:
                total = total + here.view_as(total)
            else:
                total = total.flatten().index_add(0, index.to(total.device), here).view_as(total)
        if stored is None:
            module._parameters[parameter] = nn.Parameter(total.to(dtype), requires_grad=False)
        else:
            stored.copy_(total.to(stored.dtype))


LEDGERS: weakref.WeakKeyDictionary[nn.Module, Ledger] = weakref.WeakKeyDictionary()


def _find(root: nn.Module, path: str) -> Part | None:
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


def _by_part(delta: BiasDelta) -> dict[str, dict[str, torch.Tensor]]:
    """The head's tensors by part, under their names in it; that of a parameter is empty."""
    names = delta.config.modules_to_save or []
    parts: dict[str, dict[str, torch.Tensor]] = {path: {} for path in names}
    for name, tensor in delta.head.items():
        path = part_of(name, names)
        assert path is not None  # checked when the delta was made
        parts[path][name[len(path) + 1 :]] = tensor
    return parts


def _resizable(leaf: Part, tensors: Mapping[str, torch.Tensor]) -> bool:
    if not isinstance(leaf, (nn.Linear, Conv1D)) or "weight" not in tensors:
        return False
    axis = _output_axis(leaf)
    ours, theirs = list(leaf.state_dict()["weight"].shape), list(tensors["weight"].shape)
    ours[axis] = theirs[axis]
    return ours == theirs


def _output_axis(leaf: nn.Module) -> int:
    return 1 if isinstance(leaf, Conv1D) else 0


def _head_part(leaf: Part, tensors: Mapping[str, torch.Tensor]) -> Part:
    """A copy of the model's own leaf or parameter, with the delta's tensors in the model's dtype."""
    if isinstance(leaf, nn.Parameter):
        return nn.Parameter(tensors[""].to(leaf, copy=True), requires_grad=leaf.requires_grad)
    own = leaf.state_dict()
    clone: nn.Module
    if any(own[key].shape != tensor.shape for key, tensor in tensors.items()):
        assert isinstance(leaf, (nn.Linear, Conv1D))  # `check` has let no other kind pass
        clone = resized(leaf, tensors["weight"].shape[_output_axis(leaf)]).to(own["weight"].dtype)
    else:
        clone = copy.deepcopy(leaf)
    clone.load_state_dict(dict(tensors))
    return clone.train(leaf.training)


def _has_labels(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and bool(getattr(model.config, "id2label", None))


def _labels_of(config: BitFitConfig) -> Labels:
    assert config.num_labels is not None
    names = config.id2label or {index: f"LABEL_{index}" for index in range(config.num_labels)}
    return Labels(config.num_labels, dict(names), config.problem_type)
