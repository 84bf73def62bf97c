"""[`OnnxEngine`]: ONNX Runtime computes a bank's backbone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from ...errors import OnnxGraphError, TaskBankError
from ...terms import find_biases
from ..base import check_model
from ..engine import Engine
from .folder import GRAPH_FILE, GraphInfo
from .graphs import export_onnx
from .packages import package

# Of what random deltas change, or with int8 of the answers themselves, see `Engine.tolerance`: far above rounding, and
# for float32 far below what one bias in the place of another makes.
_TOLERANCE = {"float32": 1e-3, "int8": 0.5}
# On the CPU the fused layer norm takes four times as long as the two steps that it stands for.
_SLOWER = ["SkipLayerNormFusion"]


class OnnxEngine(Engine):
    """Runs the graph of a folder that [`export_onnx`] wrote, on the CPU.

    Threads may run it at the same time. One request uses as many cores as torch does (`torch.set_num_threads`), as
    they are set when the engine is made.

    Args:
        base (`PreTrainedModel`): The base that the graph was exported from.
        folder (`str` or `os.PathLike`, *optional*): The folder; without one the base is exported into a temporary one.

    Raises:
        [`OnnxGraphError`]: The folder is damaged or incomplete.
        [`BaseModelMismatchError`]: Its graph is of another base.
        [`OnnxExportError`]: There is no folder, and the base cannot be exported.
        [`MissingDependencyError`]: The extra `onnx` is not installed.
    """

    def __init__(self, base: nn.Module, folder: str | os.PathLike[str] | None = None) -> None:
        runtime = package("onnxruntime")
        model: Any = check_model(base)
        if model.device.type != "cpu":
            raise TaskBankError(f"The engine onnxruntime computes on the CPU, and the base is on {model.device}.")
        self._own: Any = None  # a temporary folder, which is there as long as the engine is
        if folder is None:
            self._own = tempfile.TemporaryDirectory(prefix="bitfit-onnx-")
            folder = self._own.name
            export_onnx(model, folder, add_missing_biases=not _has_biases(model))
        self._where = os.fspath(folder)
        self.info = GraphInfo.read(folder)
        self.info.check_base(model.base_model, self._where)
        self.biases = [name for name, _ in self.info.biases]
        self.inputs = self.info.inputs
        self.tolerance = _TOLERANCE[self.info.weights]
        self.coarse = self.info.weights == "int8"
        self._session = open_session(runtime, Path(folder) / GRAPH_FILE)
        self._widths = self._check()
        self._values: dict[str, tuple[torch.Tensor, Any]] = {}
        self._of_numpy = runtime.OrtValue.ortvalue_from_numpy

    def _check(self) -> dict[str, int]:
        """Compares the graph with its description; returns the width of each output."""
        given = {one.name: (one.type, list(one.shape)) for one in self._session.get_inputs()}
        expected: dict[str, tuple[str, int, int | None]] = dict.fromkeys(self.inputs, ("tensor(int64)", 2, None))
        expected["rows"] = ("tensor(int64)", 2, None)
        expected |= {name: ("tensor(float)", 2, width) for name, width in self.info.biases}
        found = {one.name: list(one.shape) for one in self._session.get_outputs()}
        # The order too: it says which column of `rows` belongs to which table.
        same = list(given) == list(expected) and all(
            given[name][0] == kind and len(given[name][1]) == rank and (width is None or given[name][1][-1] == width)
            for name, (kind, rank, width) in expected.items()
        )
        known = {"last_hidden_state": 3, "pooler_output": 2}
        if not same or {name: len(shape) for name, shape in found.items()} != {
            name: known.get(name) for name in self.info.outputs
        }:
            raise OnnxGraphError(
                f"The inputs and outputs of the graph in {self._where} are not those that its description names. "
                "Export the base again: `bitfit export BASE --onnx -o DIR`."
            )
        return {name: shape[-1] for name, shape in found.items()}

    def run(
        self, inputs: Mapping[str, torch.Tensor], tables: Sequence[torch.Tensor], rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See [`Engine.run`]."""
        binding = self._session.io_binding()
        given = {**{name: value.long() for name, value in inputs.items()}, "rows": rows}
        kept = [_bind(binding.bind_input, name, value) for name, value in given.items()]
        for name, table in zip(self.biases, tables, strict=True):
            binding.bind_ortvalue_input(name, self._value(name, table))
        batch, length = inputs["input_ids"].shape
        shapes = {"last_hidden_state": (batch, length), "pooler_output": (batch,)}
        outputs = {name: torch.empty(*shapes[name], width) for name, width in self._widths.items()}
        kept += [_bind(binding.bind_output, name, value) for name, value in outputs.items()]
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's errors have no class of their own to name
            raise TaskBankError(f"ONNX Runtime cannot run this batch of shape {[batch, length]}: {error}") from error
        return outputs

    def _value(self, name: str, table: torch.Tensor) -> Any:
        """A table as ONNX Runtime sees it, in the same memory. A table that has grown is another tensor."""
        known = self._values.get(name)
        if known is None or known[0] is not table:
            known = self._values[name] = (table, self._of_numpy(table.numpy()))
        return known[1]

    def mismatch(self, error: float) -> Exception:
        """See [`Engine.mismatch`]."""
        return OnnxGraphError(
            f"The graph in {self._where} does not compute what the base computes: on a trial batch their answers "
            f"differ by {error:.2g} of what {'they are' if self.coarse else 'tasks change'}, and at most "
            f"{self.tolerance:g} is rounding. Export the base again: `bitfit export BASE --onnx -o DIR`."
        )


def _has_biases(model: Any) -> bool:
    return bool(find_biases(model.base_model))


def open_session(runtime: Any, path: Path) -> Any:
    """A session for a graph, with the options that are best for it.

    Args:
        runtime (`ModuleType`): `onnxruntime`.
        path (`Path`): The graph.

    Raises:
        [`OnnxGraphError`]: It cannot be loaded.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Heads run in torch right after it, on the same cores; threads that wait for more work would stand in its way.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return runtime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOWER
        )
    except Exception as error:  # whatever is wrong with somebody's file
        raise OnnxGraphError(f"ONNX Runtime cannot load {path}: {error}") from error


def _bind(bind: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Binds memory of torch; the tensor has to live as long as the binding."""
    value = tensor.contiguous()
    kind = numpy.int64 if value.dtype is torch.int64 else numpy.float32
    bind(name, "cpu", 0, kind, list(value.shape), value.data_ptr())
    return value
