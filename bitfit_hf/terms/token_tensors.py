"""Models with another number of tokens: which of their tensors have a row or an entry for each, and changing these.

transformers' `resize_token_embeddings` replaces layers, draws random numbers and cannot go back. Where a delta brings
the rows of its added tokens, the model only needs the room for them. Which tensors count tokens is tried out: a twin
of the model on the meta device, with one token more, differs in exactly these.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backends.sharded import is_sharded
from ..errors import AddedTokensError, collect
from .structure import shape_of, stock_root, walk

SAVE_FIRST = (
    "Save the resized model as a checkpoint of its own (`model.save_pretrained(folder)`), load that, and tune it: its "
    "rows then belong to the base."
)


@dataclass(frozen=True)
class TokenTensors:
    """The parts of a model that have one row, or one entry, per token.

    Args:
        rows (`int`): How many there are at present.
        weights (`tuple[tuple[str, ...], ...]`):
            For each matrix of embeddings the stock paths of the modules that use it, in definition order: one, or
            several where they are tied.
        biases (`tuple[tuple[str, ...], ...]`): For each bias of an output layer the stock names that it goes by.
        buffers (`Mapping[str, int]`): Names of buffers, and the dimension that counts the tokens.
    """

    rows: int
    weights: tuple[tuple[str, ...], ...]
    biases: tuple[tuple[str, ...], ...]
    buffers: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """Stock names of all matrices and biases."""
        weights = [f"{path}.weight" for paths in self.weights for path in paths]
        return weights + [name for names in self.biases for name in names]


def vocabulary_size(root: nn.Module) -> int | None:
    """How many tokens a transformers model's configuration counts; `None` for other models and those without any."""
    return size_in(root.config) if isinstance(root, PreTrainedModel) else None


def token_tensors(model: nn.Module) -> TokenTensors:
    """Finds the parts of a model that have one row or entry per token.

    Args:
        model (`nn.Module`): A transformers model with a vocabulary.

    Raises:
        [`AddedTokensError`]: There are some that new rows cannot be given to.
    """
    root = stock_root(model)
    modules = dict(walk(root))
    parameters, buffers = _counting_tokens(root)
    weights: dict[int, list[str]] = {}
    biases: dict[int, list[str]] = {}
    rows, strange = set(), []
    for name, axis in parameters.items():
        path, _, last = name.rpartition(".")
        parameter = modules[path]._parameters.get(last)
        if parameter is None:
            continue
        shape = shape_of(parameter)
        rows.add(shape[axis])
        if axis == 0 and last == "weight" and _takes_rows(modules[path]):
            weights.setdefault(id(parameter), []).append(path)
        elif len(shape) == 1:
            biases.setdefault(id(parameter), []).append(name)
        else:
            strange.append(f"{name}, {list(shape)}, of a {type(modules[path]).__name__}")
    linear = [modules[path] for paths in weights.values() for path in paths if isinstance(modules[path], nn.Linear)]
    outputs = {id(layer._parameters["bias"]) for layer in linear}
    strange += [f"{names[0]}, which no output layer reads" for key, names in biases.items() if key not in outputs]
    if strange or len(rows) != 1 or not weights:
        counts = [] if len(rows) == 1 else [f"the layers count {sorted(rows)} tokens"]
        raise AddedTokensError(
            f"It is not known how to tune the new tokens of a {type(root).__name__} apart from its others:"
            f"{collect([*strange, *counts] or ['no layer has a row per token'])}\n{SAVE_FIRST}"
        )
    return TokenTensors(rows.pop(), _groups(weights), _groups(biases), buffers)


def check_room(model: nn.Module, tensors: TokenTensors, rows: int) -> None:
    """Raises [`AddedTokensError`] where [`set_rows`] cannot give a model that many tokens."""
    if rows == tensors.rows:
        return
    modules = dict(walk(stock_root(model)))
    for name in tensors.names:
        parameter = _parameter(modules, name)
        if parameter.is_meta or is_sharded(parameter) or not _is_plain(parameter):
            raise AddedTokensError(
                f"The delta needs {rows} tokens and the model has {tensors.rows}, but {name} cannot be resized here: "
                "it is offloaded, split over processes or quantized. Load the base on one device, call "
                f"`model.resize_token_embeddings({rows})`, and load the delta then."
            )


@torch.no_grad()
def set_rows(model: nn.Module, tensors: TokenTensors, rows: int) -> None:
    """Gives a model another number of tokens, as `resize_token_embeddings` does, and the same module objects.

    New rows are the mean of the present ones, so that nothing depends on a random state; whoever asked for them writes
    its own. What the model had before is remembered, see [`restore_rows`].

    Args:
        model (`nn.Module`): A transformers model, perhaps with adapters injected.
        tensors ([`TokenTensors`]): Its own, see [`token_tensors`].
        rows (`int`): How many tokens it is to have.

    Raises:
        [`AddedTokensError`]: Its embeddings are offloaded, split over processes or quantized. It is as it was.
    """
    if rows == tensors.rows:
        return
    root = stock_root(model)
    assert isinstance(root, PreTrainedModel)
    check_room(root, tensors, rows)
    modules = dict(walk(root))
    parameters = {name: _parameter(modules, name) for name in tensors.names}
    _grown.setdefault(root, _Before(tensors.rows, vars(root).get("vocab_size")))
    for parameter in {id(parameter): parameter for parameter in parameters.values()}.values():
        parameter.data = _with_rows(parameter.data, rows, 0, mean=True)
    for path in (path for paths in tensors.weights for path in paths):
        setattr(modules[path], "num_embeddings" if isinstance(modules[path], nn.Embedding) else "out_features", rows)
    for name, axis in tensors.buffers.items():
        path, _, last = name.rpartition(".")
        buffer = modules[path]._buffers[last]
        assert buffer is not None
        modules[path]._buffers[last] = _with_rows(buffer, rows, axis, mean=False)
    root.config.get_text_config().vocab_size += rows - tensors.rows
    root.vocab_size = root.config.get_text_config().vocab_size
    note_rows(root)


def restore_rows(model: nn.Module) -> None:
    """Takes the rows out again that [`set_rows`] gave a model; does nothing to other models."""
    root = stock_root(model)
    before = _grown.get(root)
    if before is None:
        return
    set_rows(root, token_tensors(root), before.rows)
    if before.attribute is None:
        vars(root).pop("vocab_size", None)
    else:
        root.vocab_size = before.attribute  # type: ignore[assignment]
    del _grown[root]


def keep_rows(model: nn.Module) -> None:
    """Says that the rows which [`set_rows`] gave a model are its own from now on: a delta was merged into it."""
    _grown.pop(stock_root(model), None)


def was_resized(model: nn.Module) -> bool:
    """Whether `resize_token_embeddings` has left a trace in a model: an attribute that its class does not have."""
    root = stock_root(model)
    size = vocabulary_size(root)
    return size is not None and "vocab_size" in vars(root) and "vocab_size" not in vars(_twin(root, size))


def note_rows(model: nn.Module) -> None:
    """Remembers how many tokens a model has while adapters are injected into it, for [`check_rows`]."""
    root = stock_root(model)
    size = vocabulary_size(root)
    if size is not None:
        _noted[root] = size


def check_rows(model: nn.Module) -> None:
    """Refuses a model whose token embeddings were resized after the adapters were injected.

    Raises:
        [`AddedTokensError`]: They were, so the new rows are in no adapter.
    """
    root = stock_root(model)
    noted, now = _noted.get(root), vocabulary_size(root)
    if noted is not None and noted != now:
        raise AddedTokensError(
            f"The token embeddings of this {type(root).__name__} were resized from {noted} to {now} rows after the "
            "adapter was injected, so the new rows are frozen and in no file. Call `resize_token_embeddings` before "
            "`get_peft_model`, `add_adapter` or the Trainer."
        )


# --- what is known of a model ---


@dataclass(frozen=True)
class _Before:
    rows: int
    attribute: int | None  # `model.vocab_size`, which resizing sets also where the class has none


_grown: weakref.WeakKeyDictionary[nn.Module, _Before] = weakref.WeakKeyDictionary()
_noted: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_counting: weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, int], dict[str, int]]] = weakref.WeakKeyDictionary()


def size_in(config: Any) -> int | None:
    """How many tokens a configuration of transformers counts; `None` where it counts none."""
    try:
        size = getattr(config.get_text_config(), "vocab_size", None)
    except ValueError:  # several text models, each with a vocabulary of its own, which transformers does not resize
        return None
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _counting_tokens(root: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """The parameters and the buffers, by stock name, that grow with the vocabulary, and their dimension that does."""
    if root in _counting:
        return _counting[root]
    size = vocabulary_size(root)
    assert size is not None
    twins = [dict(walk(_twin(root, count))) for count in (size, size + 1)]
    found: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for path, module in twins[0].items():
        other = twins[1][path]
        for names, kind in zip(found, ("_parameters", "_buffers"), strict=True):
            for name, tensor in vars(module)[kind].items():
                larger = vars(other)[kind].get(name)
                if tensor is not None and larger is not None and tensor.shape != larger.shape:
                    axis = next(i for i, size in enumerate(tensor.shape) if size != larger.shape[i])
                    names[f"{path}.{name}".lstrip(".")] = axis
    _counting[root] = found
    return found


def _twin(root: nn.Module, vocabulary: int) -> nn.Module:
    """The same architecture on the meta device, with another number of tokens."""
    config: Any = copy.deepcopy(root.config)
    config.get_text_config().vocab_size = vocabulary
    with torch.device("meta"):
        return type(root)(config)


def _takes_rows(module: nn.Module) -> bool:
    """Whether what a layer does to one token is known: its own code runs for all tokens alike."""
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return plain and module.max_norm is None
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _parameter(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    path, _, last = name.rpartition(".")
    parameter = modules[path]._parameters[last]
    assert parameter is not None
    return parameter


def _is_plain(parameter: torch.Tensor) -> bool:
    return type(parameter.data) is torch.Tensor and parameter.is_floating_point()


def _with_rows(tensor: torch.Tensor, rows: int, axis: int, *, mean: bool) -> torch.Tensor:
    present = tensor.shape[axis]
    if rows <= present:
        return tensor.narrow(axis, 0, rows).clone()
    row = tensor.mean(axis, keepdim=True, dtype=torch.float32).to(tensor.dtype) if mean else None
    shape = [rows - present if i == axis else size for i, size in enumerate(tensor.shape)]
    new = tensor.new_zeros(shape) if row is None else row.expand(shape)
    return torch.cat([tensor, new], axis)


def _groups(found: Mapping[int, list[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(paths) for paths in found.values())
