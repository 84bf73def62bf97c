"""[`export_onnx`]: one frozen graph for all tasks of a base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...card.update import hub_name
from ...delta.parts import grouped
from ...errors import NoBiasesError, OnnxExportError
from ...storage.base_commit import base_commit
from ...storage.fingerprint import fingerprint
from ...terms import Bias, find_biases
from ..base import check_model, shared_copy
from .architectures import check_type, prepare
from .folder import GraphInfo, sha256
from .inputs import token_inputs
from .layers import GivenBiases, output_names
from .quantize import example_of, quantize
from .tracing import trace

_BATCH, _LENGTH, _TASKS = 3, 7, 4  # of the example to trace with; all different, and none of them 1


def export_onnx(
    base: nn.Module,
    folder: str | os.PathLike[str],
    *,
    int8: bool = False,
    int8_all: bool = False,
    add_missing_biases: bool = False,
) -> None:
    r"""
    Writes the backbone of a base as one ONNX graph whose weights are frozen and whose biases are inputs.

    So one file, with one SHA-256, serves all tasks of the base: `TaskBank(base, tokenizer, engine="onnxruntime",
    graph=folder)` runs it, each example with its own task's biases. Heads stay outside.

    The folder holds `model.onnx` (from half a gigabyte on with its weights beside it, in `model.onnx.data`) and
    `bitfit_graph.json`, which says what is what. The graph's inputs are, with `B` examples of `S` tokens:

    - `input_ids`, `attention_mask`, for some models `token_type_ids`: `(B, S)`, int64;
    - each bias under its stock name: a table `(tasks, width)`, float32, whose rows are `b_0 + δ`;
    - `rows`: `(B, biases)`, int64: for each example its row in each table, in the order of `biases` in
      `bitfit_graph.json`.

    Its outputs are `last_hidden_state`, `(B, S, width)`, and `pooler_output` where the backbone has a pooler.

    Args:
        base (`PreTrainedModel`): A stock backbone or task model in float32; of a task model the backbone is exported.
            It is not changed.
        folder (`str` or `os.PathLike`): Where to; made if it does not exist.
        int8 (`bool`, *optional*, defaults to `False`):
            Quantizes the weights of attention's projections and of the MLP's first product to 8 bits, one scale for
            each output, and their inputs as they come ("dynamic quantization"), after SmoothQuant has moved part of
            the inputs' largest channels into the weights. Biases and tasks stay float32.
        int8_all (`bool`, *optional*, defaults to `False`):
            The weights of the MLP's second product too: faster again, with answers further from float32's.
        add_missing_biases (`bool`, *optional*, defaults to `False`):
            Also gives the projections that have no bias an input for one, for tasks that were trained with
            `BitFitConfig(add_missing_biases=True)`.

    Raises:
        [`OnnxExportError`]: The architecture, or this model of it, cannot be exported.
        [`NoBiasesError`]: The backbone has no bias, and none is to be added.
        [`MissingDependencyError`]: The extra `onnx` is not installed.

    Example:

    ```python
    >>> base = AutoModel.from_pretrained("bert-base-uncased")
    >>> export_onnx(base, "bert-graph")
    >>> bank = TaskBank(base, tokenizer, engine="onnxruntime", graph="bert-graph")
    ```
    """
    model = check_model(base)
    stock: Any = model.base_model
    check_type(stock)
    biases = _biases(stock, add_missing_biases)
    backbone: Any = shared_copy(stock)
    prepare(backbone)
    _check_float32(backbone)
    example = token_inputs(backbone, _BATCH, _LENGTH)
    with torch.no_grad():
        outputs = output_names(stock(**example))
    tables = [torch.zeros(_TASKS, width) for _, width in _widths(biases)]
    rows = torch.zeros((_BATCH, len(biases)), dtype=torch.long)
    batch, length, tasks = (torch.export.Dim(name) for name in ("batch", "length", "tasks"))
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = trace(
        GivenBiases(backbone, biases, list(example)),
        ([*example.values()], rows, tables),
        ([{0: batch, 1: length}] * len(example), {0: batch}, [{0: tasks}] * len(tables)),
        [*example, "rows", *biases],
        outputs,
        target,
    )
    if int8 or int8_all:
        files = quantize(target, example_of(stock, _widths(biases)), every=int8_all)
    prints = fingerprint(stock, [bias for group in biases.values() for bias in group])
    if prints is None:
        raise OnnxExportError("The weights of this base are not at hand (meta device, or sharded over processes).")
    name = hub_name(getattr(model.config, "_name_or_path", None))  # never the path of a folder
    GraphInfo(
        model_class=type(stock).__name__,
        weights="int8" if int8 or int8_all else "float32",
        inputs=list(example),
        outputs=outputs,
        biases=_widths(biases),
        base_fingerprint=prints,
        sha256={path.name: sha256(path) for path in files},
        base_model_name_or_path=name,
        base_revision=getattr(model.config, "_commit_hash", None) or base_commit(name, prints),
    ).write(target)


def _biases(backbone: nn.Module, add_missing: bool) -> dict[str, list[Bias]]:
    """What the graph takes from outside, by name; the terms of a fused bias together."""
    groups = grouped(find_biases(backbone, add_missing_biases=add_missing))
    # Where a bias could be given to a norm, none is: only projections get one unless a user names the norm.
    chosen = {name: group for name, group in groups.items() if group[0].exists or _is_projection(backbone, group[0])}
    if not chosen:
        raise NoBiasesError(
            f"{type(backbone).__name__} has no bias. For tasks that add some, export with `add_missing_biases=True`."
        )
    return chosen


def _is_projection(backbone: nn.Module, bias: Bias) -> bool:
    return isinstance(backbone.get_submodule(bias.module), nn.Linear)


def _widths(biases: Mapping[str, list[Bias]]) -> list[tuple[str, int]]:
    return [(name, torch.Size(group[0].shape).numel()) for name, group in biases.items()]


def _check_float32(backbone: Any) -> None:
    others = {str(p.dtype).removeprefix("torch.") for p in backbone.parameters() if p.dtype is not torch.float32}
    if others:
        raise OnnxExportError(
            f"The base has weights in {', '.join(sorted(others))}, and ONNX Runtime computes in float32. Load it "
            "with `dtype=torch.float32`; deltas that were trained on it fit all the same."
        )
