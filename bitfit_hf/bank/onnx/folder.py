"""What stands beside a graph: which base it is of, and which table is which bias.

```json
{"format": 1, "model_class": "BertModel", "weights": "float32", "inputs": ["input_ids", "attention_mask"],
 "outputs": ["last_hidden_state"], "biases": [["embeddings.LayerNorm.bias", 384], ...],
 "base_model_name_or_path": "user/base", "base_revision": "...", "base_fingerprint": {...},
 "sha256": {"model.onnx": "..."}}
```

A folder may come from anybody. So all of this is checked when it is read, before the graph is.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import BaseModelMismatchError, DeltaFormatError, OnnxGraphError, collect
from ...storage.files import write_bytes
from ...storage.fingerprint import decode, differences

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"  # the weights, where they are too large to stand in the graph
INFO_FILE = "bitfit_graph.json"
FORMAT = 1
WEIGHTS = ("float32", "int8")

_MAX_INFO_BYTES = 64 * 2**20
_LARGEST = 10**9


@dataclass(frozen=True)
class GraphInfo:
    """The description of a graph.

    Args:
        model_class (`str`): Of the backbone.
        weights (`str`): `"float32"` or `"int8"`.
        inputs (`list[str]`): The arguments of the backbone's forward, which are inputs of the graph.
        outputs (`list[str]`): Fields of the backbone's output, which are the graph's.
        biases (`list[tuple[str, int]]`):
            Name and width of each bias, in the order of the rows of the graph's input `rows`. Each is an input of the
            graph too, under its name.
        base_fingerprint (`dict`): See [`bitfit_hf.storage.fingerprint`].
        sha256 (`dict[str, str]`): Of each file.
        base_model_name_or_path (`str`, *optional*): The base's name on the Hub.
        base_revision (`str`, *optional*): Its commit.
    """

    model_class: str
    weights: str
    inputs: list[str]
    outputs: list[str]
    biases: list[tuple[str, int]]
    base_fingerprint: dict[str, Any]
    sha256: dict[str, str]
    base_model_name_or_path: str | None = None
    base_revision: str | None = None

    def write(self, folder: Path) -> None:
        """Writes it beside the graph.

        Raises:
            [`DeltaIOError`]: It cannot be written.
        """
        values = {"format": FORMAT, **asdict(self)}
        write_bytes(folder / INFO_FILE, (json.dumps(values, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> GraphInfo:
        """Reads and checks the description of a folder, and that the files are those it was written for.

        Raises:
            [`OnnxGraphError`]: The folder is damaged, incomplete, of a later version, or no such folder at all.
        """
        folder = Path(folder)
        values = _read(folder / INFO_FILE)
        if values.get("format") != FORMAT:
            raise OnnxGraphError(
                f"{folder / INFO_FILE} has format {values.get('format')!r:.40}, and this version reads {FORMAT}. "
                "Export the graph again, or install a newer bitfit-hf."
            )
        problems = _problems(values)
        if problems:
            raise OnnxGraphError(f"{folder / INFO_FILE} is damaged:{collect(problems)}\n{_AGAIN}")
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        info = cls(**{**known, "biases": [tuple(entry) for entry in known["biases"]]})
        for name, expected in info.sha256.items():
            if sha256(folder / name) != expected:
                raise OnnxGraphError(f"{folder / name} is not the file that {INFO_FILE} describes. {_AGAIN}")
        return info

    def check_base(self, backbone: Any, where: str) -> None:
        """Compares the base at hand with the one that was exported.

        Args:
            backbone (`PreTrainedModel`): The base's backbone.
            where (`str`): The folder, for messages.

        Raises:
            [`BaseModelMismatchError`]: It is another checkpoint, or another architecture.
        """
        problems = []
        if type(backbone).__name__ != self.model_class:
            problems.append(f"it is a {type(backbone).__name__}, the graph's a {self.model_class}")
        else:
            problems += differences(backbone, self.base_fingerprint)
        if problems:
            raise BaseModelMismatchError(
                f"The graph in {where} was exported from {self.base_model_name_or_path or 'another base'}, not from "
                f"the bank's {getattr(backbone.config, '_name_or_path', None) or type(backbone).__name__}:"
                f"{collect(problems)}\nExport this base: `bitfit export BASE --onnx -o DIR`, or leave `graph` out."
            )


_AGAIN = "Fetch the folder again, or export the base again: `bitfit export BASE --onnx -o DIR`."


def sha256(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        [`OnnxGraphError`]: It cannot be read.
    """
    total = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    except OSError as error:
        raise OnnxGraphError(f"{path} cannot be read: {error}. {_AGAIN}") from error
    return total.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_INFO_BYTES:
            raise OnnxGraphError(f"{path} is too large for a description. {_AGAIN}")
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise OnnxGraphError(f"{path} does not exist, so {path.parent} is no folder with a graph. {_AGAIN}") from error
    except OSError as error:
        raise OnnxGraphError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise OnnxGraphError(f"{path} is not valid JSON ({error}). {_AGAIN}") from error
    if not isinstance(values, dict):
        raise OnnxGraphError(f"{path} holds a {type(values).__name__} instead of an object. {_AGAIN}")
    return values


def _problems(values: dict[str, Any]) -> list[str]:
    """What is wrong with a description's values; one line each."""
    problems = []

    def need(name: str, sound: bool, what: str) -> None:
        if not sound:
            problems.append(f"`{name}` is {values.get(name)!r:.60} instead of {what}")

    need("model_class", isinstance(values.get("model_class"), str), "a name")
    need("weights", values.get("weights") in WEIGHTS, f"one of {', '.join(WEIGHTS)}")
    for name, required in (("inputs", "input_ids"), ("outputs", "last_hidden_state")):
        given: Any = values.get(name)
        need(name, _names(given) and required in given, f"a list of names with {required}")
    biases: Any = values.get("biases")
    need("biases", isinstance(biases, list) and bool(biases) and all(map(_bias, biases)), "a list of [name, width]")
    if not problems and len({name for name, _ in biases} | {*values["inputs"], "rows"}) != (
        len(biases) + len(values["inputs"]) + 1
    ):
        problems.append("`biases` and `inputs` name something twice")
    files: Any = values.get("sha256")
    sound = isinstance(files, dict) and GRAPH_FILE in files and files.keys() <= {GRAPH_FILE, DATA_FILE}
    need("sha256", sound and all(isinstance(digest, str) for digest in files.values()), "the digest of each file")
    for name in ("base_model_name_or_path", "base_revision"):
        need(name, isinstance(values.get(name), (str, type(None))), "a name or null")
    try:
        decode(values["base_fingerprint"])
    except (DeltaFormatError, KeyError, TypeError, ValueError, AttributeError):
        problems.append("`base_fingerprint` is no fingerprint of a base")
    return problems


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _bias(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and bool(entry[0])
        and isinstance(entry[1], int)
        and not isinstance(entry[1], bool)
        and 0 < entry[1] < _LARGEST
    )
