"""[`export_onnx_adapter`]: one task for stock ONNX Runtime, which needs nothing of this library.

ONNX Runtime's adapters are values for initializers of a graph that may be overridden. So the graph holds the base with
its biases and an empty head, all of these overridable, and a task is a small file with `b_0 + δ` and its own head.
Graphs of tasks with equal heads on one base are equal, byte for byte.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ...delta.value import BiasDelta
from ...errors import OnnxExportError
from ...storage.fingerprint import OnMismatch
from ...terms import find_biases
from ..base import check_model
from .architectures import check_type
from .folder import GRAPH_FILE
from .inputs import token_inputs
from .layers import output_names
from .packages import package
from .tracing import trace

SUFFIX = ".onnx_adapter"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BATCH, _LENGTH = 3, 7  # of the example to trace with
_VERSION = 1  # of adapter and graph, which ONNX Runtime keeps and compares with nothing


def export_onnx_adapter(
    base: nn.Module,
    delta: BiasDelta,
    folder: str | os.PathLike[str],
    *,
    name: str = "task",
    on_base_mismatch: OnMismatch = "raise",
) -> None:
    r"""
    Writes one task as an ONNX Runtime adapter, with the graph that it belongs to.

    The folder then holds `model.onnx`, the whole task model, and `{name}.onnx_adapter`. Stock `onnxruntime` runs them:

    ```python
    session = onnxruntime.InferenceSession("model.onnx")  # warns that these initializers are no constants: on purpose
    adapter = onnxruntime.LoraAdapter()
    adapter.Load("task.onnx_adapter")
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    (logits,) = session.run(None, dict(tokenizer("It rains.", return_tensors="np")), options)
    ```

    Without an adapter the graph computes with the base's biases and a head of zeros.

    Args:
        base (`PreTrainedModel`): The task's stock model, of the class that it was trained in, with the base's weights
            in float32 and any head of the right shape. It is not changed.
        delta ([`BiasDelta`]): The task.
        folder (`str` or `os.PathLike`): Where to; made if it does not exist.
        name (`str`, *optional*, defaults to `"task"`): Of the adapter's file.
        on_base_mismatch (`str`, *optional*, defaults to `"raise"`): See [`~BiasDelta.apply_`].

    Raises:
        [`OnnxExportError`]: The model cannot be exported.
        [`BaseModelMismatchError`]: `base` is another checkpoint than the delta's.
        [`MissingDependencyError`]: The extra `onnx` is not installed.
    """
    if not _NAME.fullmatch(name):
        raise OnnxExportError(
            f"An adapter's name is a file's name of letters, digits, `.`, `_` and `-`; got {name!r}."
        )
    if delta.config.added_tokens:
        raise OnnxExportError(
            f"This delta has {delta.config.added_tokens} added tokens, and an adapter overrides no embeddings. "
            "Merge it (`bitfit merge`) and export the result."
        )
    stock: Any = check_model(base)
    check_type(stock)
    tuned: Any = delta.apply_(copy.deepcopy(stock), on_base_mismatch=on_base_mismatch).eval()
    tuned.set_attn_implementation("eager")
    state = tuned.state_dict()
    own = {name: state[name] for name in [*delta.biases, *delta.head]}
    wrong = {str(value.dtype) for value in state.values() if value.is_floating_point()} - {"torch.float32"}
    if wrong:
        raise OnnxExportError(
            f"The base has weights in {', '.join(sorted(wrong))}: load it with `dtype=torch.float32`."
        )
    defaults = {**_stock_biases(stock), **{key: torch.zeros_like(own[key]) for key in delta.head}}
    defaults |= {key: torch.zeros_like(own[key]) for key in own if key not in defaults}  # biases that the task adds
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _write_graph(tuned, defaults, target)
    write_adapter(own, target / f"{name}{SUFFIX}")


def _stock_biases(stock: nn.Module) -> dict[str, torch.Tensor]:
    """`b_0` by stock name; all of them may be overridden, so that other tasks fit the graph too."""
    parameters = dict(stock.named_parameters())
    return {bias.name: parameters[bias.name].detach() for bias in find_biases(stock) if bias.name in parameters}


class _Overridable(nn.Module):
    """A model as a function of its inputs and of some of its own parameters."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._inputs, self._names = list(inputs), list(names)

    def forward(self, inputs: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The model's output tensors."""
        own = dict(zip(self._names, values, strict=True))
        output: Any = functional_call(self.model, own, (), dict(zip(self._inputs, inputs, strict=True)))
        return tuple(output[name] for name in output_names(output))


def _write_graph(model: Any, defaults: Mapping[str, torch.Tensor], folder: Path) -> None:
    example = token_inputs(model, _BATCH, _LENGTH)
    with torch.no_grad():
        outputs = output_names(model(**example))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    names = list(defaults)
    # What is traced is given from outside; after that each becomes an initializer that may be overridden.
    trace(
        _Overridable(model, list(example), names),
        ([*example.values()], [value.clone() for value in defaults.values()]),
        ([{0: batch, 1: length}] * len(example), [{}] * len(names)),
        [*example, *names],
        outputs,
        folder,
    )
    onnx: Any = package("onnx")
    path = folder / GRAPH_FILE
    graph = onnx.load(path, load_external_data=False)
    for name, value in defaults.items():
        graph.graph.initializer.append(onnx.numpy_helper.from_array(value.contiguous().numpy(), name))
    onnx.save(graph, path)


def write_adapter(own: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes values for a graph's overridable initializers as an ONNX Runtime adapter.

    Args:
        own (`Mapping[str, torch.Tensor]`): `b_0 + δ` of each bias and the tensors of the head, by stock name.
        path (`Path`): The file.
    """
    runtime: Any = package("onnxruntime")
    adapter = runtime.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(_VERSION)
    values = {name: runtime.OrtValue.ortvalue_from_numpy(value.contiguous().numpy()) for name, value in own.items()}
    adapter.set_parameters(values)
    adapter.export_adapter(os.fspath(path))
