"""How a tensor of a delta is called: in the stock model, in the file, in a live model with adapters.

| | a bias's delta | a tensor of the head |
|---|---|---|
| stock name | `bert.encoder.layer.0.output.dense.bias` | `classifier.weight` |
| key | `bert.encoder.layer.0.output.dense.bitfit_bias` | `classifier.weight` |
| key in the file | `base_model.model.` before it | `base_model.model.` before it |
| live path | what wrappers insert stands between its parts | the same |
"""

from __future__ import annotations

from ..terms.structure import HOLDER, TRANSPARENT

FILE_PREFIX = "base_model.model."  # PEFT's, in front of every tensor's key
PREFIX = "bitfit_"  # in front of the bias's own name
VALUE = "bitfit_value"  # under which the wrapper of a parameter that lies in no module keeps it

# Rows of added tokens, by the last part of their key, and the parameter of the layer that they belong to.
ADDED_ROWS, ADDED_BIAS = "added_rows", "added_bias"
ADDED = {ADDED_ROWS: "weight", ADDED_BIAS: "bias"}

# Parts of a live path that the stock model does not have.
_INSERTED = frozenset({*TRANSPARENT, "base_layer", "original_module", VALUE})


def delta_key(module: str, parameter: str) -> str:
    """The key of the delta of a bias: of the parameter of that name in the module at a stock path."""
    return f"{module}.{PREFIX}{parameter}"


def key_of_bias(name: str) -> str:
    """The key of the delta of a bias by the bias's stock name."""
    module, _, parameter = name.rpartition(".")
    return delta_key(module, parameter)


def bias_of_key(key: str) -> str | None:
    """The stock name of the bias that a tensor is the delta of; `None` for tensors of the head and of added tokens."""
    module, _, last = key.rpartition(".")
    return f"{module}.{last.removeprefix(PREFIX)}" if last.startswith(PREFIX) else None


def is_added(key: str) -> bool:
    """Whether a tensor holds rows of added tokens, by its key."""
    return key.rpartition(".")[2] in ADDED


def in_file(key: str) -> str:
    """A key as it stands in `adapter_model.safetensors`."""
    return FILE_PREFIX + key


def from_file(key: str) -> str:
    """The inverse of [`in_file`]; a key without PEFT's prefix is taken as it is."""
    return key.removeprefix(FILE_PREFIX)


def stock_path(live: str) -> str:
    """The stock path of a module or parameter of a live model: without what wrappers insert."""
    parts = (part for part in from_file(live).split(".") if part not in _INSERTED)
    return ".".join(part.removeprefix(HOLDER) for part in parts)


def is_adapters(live: str) -> bool:
    """Whether a live name is that of a delta or of a head's copy, of whichever adapter, and not the stock model's."""
    parts = live.split(".")
    return "modules_to_save" in parts or any(part.startswith(PREFIX) for part in parts)
