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
from .resizing import restore_rows, set_rows
from .terms.structure import stock_root, walk
from .tuner.head import Labels, resized
from .tuner.layer import reads_bias, span_index
from .tuner.token_rows import added_shapes, parameter_of, write_rows

if TYPE_CHECKING:
    from .delta import BiasDelta


@dataclass
class Ledger:
    """The base's own tensors while deltas are written over them."""

    model_ref: Any
    applied: list[BiasDelta] = field(default_factory=list)
    biases: dict[str, torch.Tensor | None] = field(default_factory=dict)
    leaves: dict[str, nn.Module] = field(default_factory=dict)
    # The model's own rows where those of added tokens are written, by their name in a file.
    token_rows: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    labels: Labels | None = None

    def __post_init__(self) -> None:
        model = self.model_ref
        self.model_ref = weakref.ref(model)
        self.labels = Labels.of(model) if _has_labels(model) else None

    def check(self, delta: BiasDelta) -> None:
        """Raises what is wrong with applying `delta`, before anything is written."""
        model = self.model_ref()
        modules = dict(walk(stock_root(model)))
        tokens = [placed for other in (*self.applied, delta) if (placed := other.place_tokens(model)) is not None]
        base_rows = {name: rows for placed in tokens for name, rows in placed.base_rows.items()}
        problems = []
        if delta.added:
            wanted = added_shapes(modules, tokens[-1])
            found = {name: tuple(tensor.shape) for name, tensor in delta.added.items()}
            problems += [f"{name} of the added tokens has no place" for name in found if name not in wanted]
            problems += [
                f"{name} of the added tokens is {found.get(name, 'missing')}, the model needs {shape}"
                for name, shape in wanted.items()
                if found.get(name) != shape
            ]
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
            elif stored is not None and tuple(stored[: base_rows.get(name)].shape) != group[0].shape:
                problems.append(f"{name} has shape {list(group[0].shape)}, the model's {list(stored.shape)}")
        for path, tensors in _by_leaf(delta).items():
            leaf = modules.get(path)
            if leaf is None:
                problems.append(f"the head's {path} has no place: {type(model).__name__} has no such layer")
                continue
            own = leaf.state_dict()
            if own.keys() != tensors.keys():
                problems.append(f"the head's {path} holds {sorted(tensors)}, the model's {sorted(own)}")
            elif any(own[key].shape != tensors[key].shape for key in own) and not _resizable(leaf, tensors):
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
        self._make_room_for_tokens(modules)
        groups = {name: group for delta in self.applied for name, group in delta.biases.items()}
        for name, group in groups.items():
            stored = modules[group[0].module]._parameters.get(group[0].parameter)
            own = None if stored is None else stored.detach()[: group[0].shape[0]].clone()  # added tokens' come after
            self.biases.setdefault(name, own)
        with torch.no_grad():
            for name, base in self.biases.items():
                path, _, parameter = name.rpartition(".")
                self._write_bias(modules[path], parameter, name, base)
        for path, leaf in self.leaves.items():
            _put(root, path, leaf)
        headed = next((delta for delta in reversed(self.applied) if delta.head), None)
        if headed is not None:
            for path, tensors in _by_leaf(headed).items():
                leaf = self.leaves.setdefault(path, root.get_submodule(path))
                _put(root, path, _head_leaf(leaf, tensors))
        labels = None if headed is None or headed.config.num_labels is None else _labels_of(headed.config)
        if self.labels is not None and isinstance(model, PreTrainedModel):
            (labels or self.labels).give_to(model)

    def _make_room_for_tokens(self, modules: Mapping[str, nn.Module]) -> None:
        """Gives the model as many rows as the applied deltas need, and writes those of the last; or takes them out."""
        model = self.model_ref()
        for name, (start, rows) in self.token_rows.items():
            write_rows(parameter_of(modules, name), start, rows)
        self.token_rows.clear()
        delta = next((delta for delta in reversed(self.applied) if delta.added), None)
        if delta is None:
            restore_rows(model)
            return
        tokens = delta.place_tokens(model)
        assert tokens is not None
        set_rows(model, tokens.tensors, max(tokens.tensors.rows, tokens.stop))
        for name, rows in delta.added.items():
            parameter = parameter_of(modules, name)
            self.token_rows[name] = (tokens.start, parameter.detach()[tokens.start : tokens.stop].clone())
            write_rows(parameter, tokens.start, rows)

    def _write_bias(self, module: nn.Module, parameter: str, name: str, base: torch.Tensor | None) -> None:
        deltas = [(delta[name], span_index(delta.biases[name])) for delta in self.applied if name in delta]
        stored = module._parameters.get(parameter)
        if not deltas:
            if base is None:
                module._parameters[parameter] = None
            elif stored is not None:
                stored[: len(base)].copy_(base)
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
            stored[: len(total)].copy_(total.to(stored.dtype))


LEDGERS: weakref.WeakKeyDictionary[nn.Module, Ledger] = weakref.WeakKeyDictionary()


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _by_leaf(delta: BiasDelta) -> dict[str, dict[str, torch.Tensor]]:
    leaves: dict[str, dict[str, torch.Tensor]] = {path: {} for path in delta.config.modules_to_save or []}
    for name, tensor in delta.head.items():
        path = leaf_of(name, delta.config.modules_to_save or [])
        assert path is not None  # checked when the delta was made
        leaves[path][name.removeprefix(f"{path}.")] = tensor
    return leaves


def _resizable(leaf: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    if not isinstance(leaf, (nn.Linear, Conv1D)) or "weight" not in tensors:
        return False
    axis = _output_axis(leaf)
    ours, theirs = list(leaf.state_dict()["weight"].shape), list(tensors["weight"].shape)
    ours[axis] = theirs[axis]
    return ours == theirs


def _output_axis(leaf: nn.Module) -> int:
    return 1 if isinstance(leaf, Conv1D) else 0


def _head_leaf(leaf: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the model's own leaf, with the delta's tensors in the model's dtype."""
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


def leaf_of(name: str, leaves: list[str]) -> str | None:
    """The one of the head's `leaves` that the tensor `name` belongs to."""
    return next((leaf for leaf in leaves if name.startswith(f"{leaf}.")), None)
