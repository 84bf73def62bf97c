"""Is this the checkpoint that the delta was trained on?

A delta is a difference to one set of weights; on another checkpoint of the same shape it gives nonsense without an
error. So the configuration of a delta carries a fingerprint of its base: of every tuned bias the shape, a digest and a
sample of its values, of every tuned module's weight a sample. It survives a change of dtype: the digests are kept at
three precisions, and what was rounded to a lower one is compared there. Only weights that are quantized are compared
by a tolerance; biases never are quantized, and tell a fine-tuned sibling from a quantized copy, which correlations do
not.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy
import torch
from torch import nn

from ..backends.quantized import dequantized, unpacked
from ..backends.sharded import gathered
from ..errors import BaseModelMismatchError, ConfigError, DeltaFormatError, collect
from ..terms import Bias
from ..terms.base_bias import base_bias
from ..terms.structure import stock_root, walk
from .packed import unpack_print

FORMAT = 2  # 1 had the values packed into strings, see `packed`
SAMPLES = 8  # values kept of each tensor
QUANTIZED = "quantized"
# Of a quantized weight's largest sampled value. The coarsest format in use (4 bit, blocks of 64) stays below it.
QUANTIZED_TOLERANCE = 0.3

OnMismatch = Literal["raise", "warn", "ignore"]
_policy: ContextVar[OnMismatch] = ContextVar("bitfit_base_mismatch", default="raise")

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOADERS = ("bitfit_hf", "peft", "transformers")
_DIGEST = re.compile(r"[0-9a-f]{12}")
_MANTISSA_BITS = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}


@contextmanager
def base_mismatch(policy: OnMismatch) -> Iterator[None]:
    """Says what the stock ways of loading do when a delta belongs to another checkpoint. Never read from a file.

    Args:
        policy (`str`): `"raise"` (the default everywhere), `"warn"` or `"ignore"`.

    Example:

    ```python
    with base_mismatch("warn"):
        model = PeftModel.from_pretrained(base, "user/bert-base-rte-bitfit")
    ```
    """
    if policy not in get_args(OnMismatch):
        raise ConfigError(f"The policy for a base mismatch is one of {get_args(OnMismatch)}, got {policy!r}.")
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


@dataclass(frozen=True)
class TensorPrint:
    """The fingerprint of one tensor.

    Args:
        dtype (`str`): The tensor's dtype, or `"quantized"`.
        shape (`tuple[int, ...]`): Its shape.
        digests (`dict[str, str]`): By precision, the start of the SHA-256 over all its values; empty for weights.
        sample (`tuple[float, ...]`): Values at evenly spaced places, as float32.
    """

    dtype: str
    shape: tuple[int, ...]
    digests: dict[str, str]
    sample: tuple[float, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, *, whole: bool, dtype: str | None = None) -> TensorPrint:
        """Takes the fingerprint of `tensor`; `whole` adds the digests over all values."""
        flat = tensor.detach().flatten()
        places = [i * max(flat.numel() - 1, 0) // max(SAMPLES - 1, 1) for i in range(min(SAMPLES, flat.numel()))]
        sample = tuple(flat[places].to(torch.float32).tolist()) if places else ()
        digests = {name: _digest(flat, precision) for name, precision in _PRECISIONS.items()} if whole else {}
        return cls(dtype or str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), digests, sample)

    def encode(self) -> dict[str, Any]:
        """As plain values: `dtype`, `shape`, `sample`, and for biases `sha256` by precision."""
        values = {
            "dtype": self.dtype,
            "shape": list(self.shape),
            # The fewest digits that give the same float32 back. JSON has no numbers that are not finite.
            "sample": [float(str(numpy.float32(v))) if math.isfinite(v) else str(v) for v in self.sample],
        }
        return values | ({"sha256": dict(self.digests)} if self.digests else {})

    @classmethod
    def decode(cls, values: Mapping[str, Any]) -> TensorPrint:
        """The inverse of [`~TensorPrint.encode`].

        Raises:
            `ValueError`, `TypeError`, `KeyError`: `values` are no fingerprint.
        """
        dtype, shape, digests = values["dtype"], tuple(values["shape"]), dict(values.get("sha256", {}))
        if dtype != QUANTIZED and dtype not in _MANTISSA_BITS:
            raise ValueError(f"unknown dtype {dtype!r:.40}")
        if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape):
            raise ValueError(f"no shape: {shape!r:.40}")
        if digests and (digests.keys() != _PRECISIONS.keys() or not all(map(_DIGEST.fullmatch, digests.values()))):
            raise ValueError(f"no digests: {digests!r:.60}")
        sample = tuple(torch.tensor([float(value) for value in values["sample"]], dtype=torch.float32).tolist())
        if len(sample) != min(SAMPLES, math.prod(shape)):
            raise ValueError(f"{len(sample)} sampled values of a tensor of shape {list(shape)}")
        return cls(dtype, shape, digests, sample)

    def difference(self, other: TensorPrint) -> str | None:
        """How `other`, the tensor at hand, differs from this one, or `None` where it is the same."""
        if self.shape != other.shape:
            return f"has shape {list(other.shape)} instead of {list(self.shape)}"
        gap = max((abs(a - b) for a, b in zip(self.sample, other.sample, strict=False)), default=0.0)
        if QUANTIZED in (self.dtype, other.dtype):
            scale = max((abs(a) for a in self.sample), default=0.0)
            return f"differs by {gap:.1e} after quantization" if gap > QUANTIZED_TOLERANCE * scale else None
        lower = min((self.dtype, other.dtype), key=_MANTISSA_BITS.__getitem__)
        if {self.dtype, other.dtype} == {"float16", "bfloat16"}:
            # Both are roundings of something finer, and a rounding of a rounding may differ from it by one unit.
            same = all(
                abs(a - b) <= 2.0**-7 * max(abs(a), abs(b)) for a, b in zip(self.sample, other.sample, strict=True)
            )
        else:
            precision = "float32" if lower == "float64" else lower
            mine, theirs = (torch.tensor(p.sample).to(_PRECISIONS[precision]) for p in (self, other))
            same = torch.equal(mine, theirs) and self.digests.get(precision) == other.digests.get(precision)
        if same:
            return None
        return f"differs by {gap:.1e} or more" if gap else "differs outside the sampled values"


def _digest(flat: torch.Tensor, precision: torch.dtype) -> str:
    values = flat.to(precision).contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:12]


def fingerprint(
    model: nn.Module, biases: Iterable[Bias], *, base_rows: Mapping[str, int] | None = None
) -> dict[str, Any] | None:
    """Fingerprint of the base that `biases` are tuned on.

    Args:
        model (`nn.Module`): The base model, stock or with adapters injected; its stored values are read.
        biases (`Iterable[Bias]`): What is tuned.
        base_rows (`Mapping[str, int]`, *optional*):
            Of tensors that were given more rows than the checkpoint has, by stock name: how many of them, from the
            first, are the checkpoint's.

    Returns:
        `dict`, ready for JSON, or `None` where the values are not at hand (meta device, sharded parameters).
    """
    modules = dict(walk(stock_root(model)))
    prints: dict[str, dict[str, Any]] = {}
    for bias in biases:
        module = modules[bias.module]
        for name, tensor, whole, dtype in _tensors(module, bias.parameter):
            if tensor is not None and (tensor.is_meta or tensor.numel() == 0):
                return None
            key = f"{bias.module}.{name}" if bias.module else name
            if tensor is not None and key not in prints:
                tensor = tensor[: (base_rows or {}).get(key)]
                prints[key] = TensorPrint.of(tensor, whole=whole, dtype=dtype).encode()
    return {"format": FORMAT, "tensors": prints}


def _tensors(module: nn.Module, parameter: str) -> Iterator[tuple[str, torch.Tensor | None, bool, str | None]]:
    yield parameter, _stored(module, parameter), True, None
    weight = "in_proj_weight" if parameter == "in_proj_bias" else "weight"
    stored = _stored(module, weight)
    if stored is not None:
        if stored.dtype.is_floating_point and not hasattr(stored, "dequantize_"):
            plain = unpacked(stored)
            yield weight, plain, False, None if plain is stored else QUANTIZED
        else:
            yield weight, dequantized(module), False, QUANTIZED


def _stored(module: nn.Module, name: str) -> torch.Tensor | None:
    tensor = base_bias(module, name)
    if tensor is None or not tensor.is_meta:
        return None if tensor is None else gathered(tensor)
    offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)  # accelerate's offloading
    return tensor if offloaded is None or name not in offloaded else offloaded[name]


def decode(expected: Mapping[str, Any]) -> dict[str, TensorPrint]:
    """Reads the `base_fingerprint` of a configuration, of this version's format or an earlier one.

    Raises:
        [`DeltaFormatError`]: It is damaged, or of a later format.
    """
    if expected.get("format") not in (1, FORMAT) or isinstance(expected["format"], bool):
        raise DeltaFormatError(
            f"adapter_config.json: `base_fingerprint` has format {expected.get('format')!r:.40}, this version of "
            f"bitfit_hf reads {FORMAT}. Upgrade bitfit_hf, or fetch the delta again."
        )
    tensors = expected.get("tensors")
    if not isinstance(tensors, dict):
        raise DeltaFormatError("adapter_config.json: `base_fingerprint` has no `tensors`; fetch the delta again.")
    prints = {}
    for name, values in tensors.items():
        try:
            prints[name] = TensorPrint.decode(unpack_print(values) if expected["format"] == 1 else values)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise DeltaFormatError(
                f"adapter_config.json: the fingerprint of {name!r} is damaged ({error}); fetch the delta again."
            ) from error
    return prints


def plain_fingerprint(expected: dict[str, Any]) -> dict[str, Any]:
    """A `base_fingerprint` in this version's format, where it is of an earlier one.

    Raises:
        [`DeltaFormatError`]: It is damaged.
    """
    if expected.get("format") != 1:
        return expected  # what is wrong with a later one is said where it is used
    return {"format": FORMAT, "tensors": {name: found.encode() for name, found in decode(expected).items()}}


def differing(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], bool]:
    """Compares two fingerprints, whatever dtypes the base was loaded in.

    Returns:
        `tuple[list[str], bool]`: The tensors in both that differ, and whether there are any in both.
    """
    mine, theirs = decode(one), decode(other)
    shared = [name for name in mine if name in theirs]
    return [name for name in shared if mine[name].difference(theirs[name]) is not None], bool(shared)


def differences(model: nn.Module, expected: dict[str, Any], base_rows: Mapping[str, int] | None = None) -> list[str]:
    """How the stored values of `model` differ from the fingerprint `expected`, one line for each tensor."""
    modules = dict(walk(stock_root(model)))
    problems = []
    for name, wanted in decode(expected).items():
        path, _, parameter = name.rpartition(".")
        module = modules.get(path)
        if module is None or module._parameters.get(parameter) is None:
            problems.append(f"{name} does not exist in this model")
            continue
        owner = "bias" if parameter in ("weight", "in_proj_weight") else parameter
        found = {key: (tensor, dtype) for key, tensor, _, dtype in _tensors(module, owner)}
        tensor, dtype = found.get(parameter, (_stored(module, parameter), None))
        if tensor is None or tensor.is_meta or tensor.numel() == 0:
            continue  # sharded or not loaded yet: nothing to compare with
        tensor = tensor[: (base_rows or {}).get(name)]
        problem = wanted.difference(TensorPrint.of(tensor, whole=bool(wanted.digests), dtype=dtype))
        if problem is not None:
            problems.append(f"{name} {problem}")
    return problems


def check_base(
    model: nn.Module,
    expected: dict[str, Any] | None,
    *,
    delta_base: str | None,
    on_mismatch: OnMismatch | None = None,
    base_rows: Mapping[str, int] | None = None,
) -> None:
    """Compares `model` with the fingerprint of the base that a delta was trained on.

    Args:
        model (`nn.Module`): The base at hand.
        expected (`dict`, *optional*): The delta's `base_fingerprint`; without one there is a warning instead.
        delta_base (`str`, *optional*): Name of the delta's base, for the message.
        on_mismatch (`str`, *optional*): What to do; by default what [`base_mismatch`] says.
        base_rows (`Mapping[str, int]`, *optional*): As for [`fingerprint`]; the other rows are not compared.

    Raises:
        [`BaseModelMismatchError`]: The model is another checkpoint; it has not been changed.
    """
    policy = on_mismatch or _policy.get()
    if policy not in get_args(OnMismatch):
        raise ConfigError(f"`on_base_mismatch` is one of {get_args(OnMismatch)}, got {policy!r}.")
    if policy == "ignore":
        return
    found = getattr(getattr(model, "config", None), "_name_or_path", None) or type(model).__name__
    if expected is None or not decode(expected):
        warnings.warn(
            f"This delta has no `base_fingerprint`. It was trained on {delta_base or 'a base that it does not name'}; "
            f"whether {found} has the same weights is not checked. Save the delta again from the model that it was "
            'trained in, or pass `on_base_mismatch="ignore"` (or load inside `with '
            'bitfit_hf.base_mismatch("ignore"):`) if you know that it is the right base.',
            stacklevel=_users_level(),
        )
        return
    problems = differences(model, expected, base_rows)
    if not problems:
        return
    message = (
        f"This delta was trained on {delta_base or 'another checkpoint'}, not on the weights of {found}: "
        f"{len(problems)} of {len(expected['tensors'])} tensors differ.{collect(problems)}\n"
        "Load that base (its name and `revision` are in the delta's adapter_config.json). To use the delta here all "
        'the same, pass `on_base_mismatch="warn"`, or load inside `with bitfit_hf.base_mismatch("warn"):`. To train a '
        "new delta on this base, start from a fresh BitFitConfig."
    )
    if policy == "raise":
        raise BaseModelMismatchError(message)
    warnings.warn(message, stacklevel=_users_level())


def _users_level() -> int:
    """The `stacklevel` that names the user's own line: the first outside of the libraries that load deltas."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LOADERS:
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return level
