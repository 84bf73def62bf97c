"""[`TokenRows`]: the rows of added tokens in a layer of token embeddings or an output layer, one set per adapter.

PEFT has a method for single tokens, `TrainableTokensLayer`. It writes the rows into a copy of the whole matrix at
every step, leaves out the bias of an output layer that is tied to the embeddings (BERT's), and trains in the base's
dtype. Here the base's layer runs as it is, and only what it answers for the added tokens is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..backends.sharded import gathered, lent
from ..errors import AdapterNameError, MergeError
from ..storage.keys import ADDED, ADDED_BIAS, ADDED_ROWS
from ..terms.structure import shape_of, stock_module
from .added_tokens import AddedTokens
from .head import BitFitHead
from .mixed import BASE


class NewRows(nn.Module):
    """The tensors of one adapter in one layer, float32.

    Args:
        start (`int`): Number of the first added token.
        count (`int`): How many there are.
        rows (`torch.Tensor` of shape `(count, width)`, *optional*): Their embeddings; `None` where they are another's.
        bias (`torch.Tensor` of shape `(count,)`, *optional*): Their entries in an output layer's bias.
    """

    def __init__(self, start: int, count: int, rows: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.start, self.stop = start, start + count
        for name, value in ((ADDED_ROWS, rows), (ADDED_BIAS, bias)):
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))


class TokenRows(BitFitHead):
    """
    Wraps a layer with one row per token, and lets it compute with an adapter's rows for the tokens that the checkpoint
    does not have. They are whole rows and no differences, since the base has none to differ from.

    Args:
        module (`nn.Module`): An `nn.Embedding` or `nn.Linear`, perhaps in a [`BitFitLayer`].
        adapter_name (`str`): The first adapter.
        start (`int`), count (`int`): Its added tokens.
        leader ([`TokenRows`], *optional*): The layer whose matrix this one's is tied to; the rows are its.
    """

    def __init__(
        self, module: nn.Module, adapter_name: str, *, start: int, count: int, leader: TokenRows | None = None
    ) -> None:
        # In a tuple, so that `nn.Module` does not register the leader as a child as well.
        self._leader = (leader,)
        super().__init__(module, adapter_name, start=start, count=count)

    def check_module(self) -> None:
        """Does nothing: what fits was found out before, and a tuned layer may be inside."""

    def update(self, adapter_name: str, *, start: int, count: int, **kwargs: Any) -> None:  # type: ignore[override]
        """Adds an adapter, whose rows are at first those that the base's layer has at present."""
        layer: Any = stock_module(self.original_module)
        rows = None if self._leader[0] is not None else _part(layer.weight, start, count)
        stored = layer._parameters.get("bias")
        bias = None if stored is None else _part(stored, start, count)
        self.modules_to_save[adapter_name] = NewRows(start, count, rows, bias)
        self._adapters.add(adapter_name)

    # --- adapters ---

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activates an adapter; those without added tokens have none here, and are passed over."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        mine = [name for name in names if name in self._adapters]
        for name, rows in self.modules_to_save.items():
            rows.requires_grad_(name in mine and not inference_mode)
        self._active_adapter = mine

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        several = [] if isinstance(adapter_name, str) else [n for n in adapter_name if n in self.modules_to_save]
        if len(several) > 1:
            raise AdapterNameError(
                f"The adapters {several} have added tokens each, and a token has one embedding at a time. Activate "
                "one of them."
            )
        return adapter_name if isinstance(adapter_name, str) else next(iter(several), None)

    def serves(self, adapter_names: Sequence[str]) -> bool:
        """Whether one of these adapters has added tokens here."""
        return any(name in self._adapters for name in adapter_names)

    # --- forward ---

    def forward(self, input: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        result = self.original_module(input, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is None:
            return self._replace(result, input, next(iter(self.active_adapters), None))
        assert self._mixed is not None
        factor = self._mixed.rows_per_example(self, result.shape[0])
        names = [name for name in adapter_names for _ in range(factor)]
        for name in dict.fromkeys(names):
            if name != BASE and name in self._adapters:
                where = [i for i, other in enumerate(names) if other == name]
                result[where] = self._replace(result[where], input[where], name)
        return result

    def _replace(self, result: torch.Tensor, input: torch.Tensor, name: str | None) -> torch.Tensor:
        """Puts the answers for the added tokens of adapter `name` in their places in those of the base's layer."""
        if name is None:
            return result
        layer: Any = stock_module(self.original_module)
        own: Any = self.modules_to_save[name]
        rows = self._rows(name).to(result.dtype)
        if isinstance(layer, nn.Linear):
            bias = None if own.added_bias is None else lent(own.added_bias, layer).to(result.dtype)
            result[..., own.start : own.stop] = functional.linear(input.to(result.dtype), rows, bias)
            return result
        padding = layer.padding_idx
        inside = padding is not None and own.start <= padding < own.stop
        new = functional.embedding(
            (input - own.start).clamp(0, own.stop - own.start - 1), rows, padding - own.start if inside else None
        )
        scale = getattr(layer, "embed_scale", None)
        if scale is not None:
            new = new * (scale.to(new.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where(((input >= own.start) & (input < own.stop)).unsqueeze(-1), new, result)

    def _rows(self, name: str) -> torch.Tensor:
        holder: Any = self if self._leader[0] is None else self._leader[0]
        return lent(holder.modules_to_save[name].added_rows, stock_module(self.original_module))

    # --- the rest of the model sees the stock layer ---

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        return True

    def _getattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> Any:
        value = getattr(self.original_module, name)
        if name not in ADDED.values() or value is None:
            return value
        # For code that takes the matrix or the bias from the layer and computes with it by itself.
        own: Any = self.modules_to_save[self.active_adapters[0]]
        new = self._rows(self.active_adapters[0]) if name == "weight" else own.added_bias
        return torch.cat([value[: own.start], new.to(value.dtype), value[own.stop :]])

    # --- unloading ---

    def check_merge(self, safe_merge: bool, adapter_names: Sequence[str]) -> None:
        """Raises [`MergeError`] for what would be wrong with merging, before any layer has been touched."""
        served = [name for name in adapter_names if name in self._adapters]
        rows = self.modules_to_save[served[0]].parameters() if safe_merge and served else ()
        if not all(torch.isfinite(tensor).all() for tensor in rows):
            raise MergeError(f"The rows of the added tokens of {served[0]!r} hold NaN or Inf; it seems to be broken.")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's hook: the base's layer, with the adapter's rows written into it when merging."""
        names = self.active_adapters if adapter_names is None else [n for n in adapter_names if n in self._adapters]
        if merge and names:
            layer: Any = stock_module(self.original_module)
            own: Any = self.modules_to_save[names[0]]
            for name, new in own.named_parameters():
                write_rows(layer._parameters[ADDED[name]], own.start, new)
        self._active_adapter = []
        return self.original_module


def added_shapes(modules: Mapping[str, nn.Module], tokens: AddedTokens) -> dict[str, tuple[int, ...]]:
    """Names in a file, and shapes, of the tensors that hold the rows of `tokens`.

    Args:
        modules (`Mapping[str, nn.Module]`): Of the stock model, by path.
        tokens ([`AddedTokens`]): The added tokens.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, leader in token_layers(tokens):
        layer: Any = modules[path]
        if leader is None:
            shapes[f"{path}.{ADDED_ROWS}"] = (tokens.count, shape_of(layer.weight)[1])
        if layer._parameters.get("bias") is not None:
            shapes[f"{path}.{ADDED_BIAS}"] = (tokens.count,)
    return shapes


def token_layers(tokens: AddedTokens) -> Iterator[tuple[str, str | None]]:
    """The layers that have rows of added tokens, and for each the one whose matrix it shares, which comes first."""
    for leader, *others in tokens.tensors.weights:
        yield leader, None
        for path in others:
            yield path, leader


def parameter_of(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    """The stock model's parameter that the rows or entries of added tokens called `name` in a file belong to."""
    path, _, last = name.rpartition(".")
    parameter = modules[path]._parameters[ADDED[last]]
    assert parameter is not None
    return parameter


def write_rows(parameter: nn.Parameter, start: int, rows: torch.Tensor) -> None:
    """Writes the rows or entries of added tokens into a model's own parameter.

    Args:
        parameter (`nn.Parameter`): With room for them.
        start (`int`): Number of the first added token.
        rows (`torch.Tensor`): Theirs.
    """
    with torch.no_grad():
        parameter[start : start + len(rows)] = rows.to(parameter.device, parameter.dtype)


def _part(tensor: torch.Tensor, start: int, count: int) -> torch.Tensor:
    return gathered(tensor).detach()[start : start + count].to(torch.float32, copy=True)
