"""int8 weights for a graph."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from ...errors import OnnxExportError
from .folder import DATA_FILE, GRAPH_FILE, GraphInfo, sha256
from .inputs import token_inputs
from .packages import package
from .smoothing import smooth

_EXAMPLES, _TOKENS = 16, 64  # of the batch that shows how large each input of a product becomes


def quantized_copy(
    source: str | os.PathLike[str], target: str | os.PathLike[str], base: nn.Module, *, every: bool = False
) -> None:
    """Writes the folder of a float32 graph anew with int8 weights; tracing takes far longer than that.

    Args:
        source (`str` or `os.PathLike`): A folder that [`export_onnx`] wrote.
        target (`str` or `os.PathLike`): Where to; made if it does not exist.
        base (`PreTrainedModel`): The base that the graph was exported from.
        every (`bool`, *optional*, defaults to `False`): See [`quantize`].

    Raises:
        [`OnnxGraphError`]: There is no sound graph in `source`.
        [`BaseModelMismatchError`]: It is of another base.
        [`OnnxExportError`]: It cannot be done.
    """
    info = GraphInfo.read(source)
    backbone: Any = base.base_model
    info.check_base(backbone, os.fspath(source))
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in info.sha256:
        shutil.copyfile(Path(source) / name, target / name)
    files = quantize(target, example_of(backbone, info.biases), every=every)
    replace(info, weights="int8", sha256={path.name: sha256(path) for path in files}).write(target)


def example_of(backbone: Any, biases: Sequence[tuple[str, int]]) -> dict[str, numpy.ndarray]:
    """A batch of random tokens for a graph, with the base's own biases.

    Args:
        backbone (`PreTrainedModel`): The base's.
        biases (`Sequence[tuple[str, int]]`): Names and widths of those that the graph takes from outside.
    """
    length = max(1, min(_TOKENS, getattr(backbone.config, "max_position_embeddings", _TOKENS) // 2))
    values = token_inputs(backbone, _EXAMPLES, length)
    values["rows"] = torch.zeros((_EXAMPLES, len(biases)), dtype=torch.long)
    state = backbone.state_dict()
    for name, width in biases:  # one that the base lacks is zero
        values[name] = state[name].float().reshape(1, width) if name in state else torch.zeros(1, width)
    return {name: value.numpy() for name, value in values.items()}


def quantize(folder: Path, example: Mapping[str, numpy.ndarray], *, every: bool = False) -> list[Path]:
    """Quantizes weights of a graph's products to 8 bits, in place; what the products get is quantized as it comes.

    Those are the products that do not narrow: attention's projections and the MLP's first one, whose input has been
    normalized. What the MLP's second product gets are the values behind the activation function, a few of them far
    beyond all others in some positions only, and a scale for all loses the rest. The products of two activations stay
    float32, as do biases.

    Args:
        folder (`Path`): With `model.onnx`.
        example (`Mapping[str, numpy.ndarray]`): Inputs of the graph that are like those that it will get.
        every (`bool`, *optional*, defaults to `False`): The MLP's second product too, and all others with a frozen
            weight.

    Returns:
        `list[Path]`: The files.

    Raises:
        [`OnnxExportError`]: It cannot be done.
    """
    onnx, quantization = package("onnx"), package("onnxruntime.quantization")
    source = folder / GRAPH_FILE
    large = (folder / DATA_FILE).exists()
    with tempfile.TemporaryDirectory(dir=folder) as pending:
        target = Path(pending) / GRAPH_FILE
        try:
            model = onnx.load(source)
            package("onnxruntime.quantization.quant_utils").add_pre_process_metadata(model)  # else it warns
            kept, narrowing = _products(model)
            if not kept and not (every and narrowing):  # to the quantizer an empty list means all
                raise OnnxExportError("No weight of this graph can be quantized to 8 bits.")
            names = [node.name for node in (*kept, *(narrowing if every else ()))]
            smooth(model, kept, example)
            quantization.quantize_dynamic(
                model,
                target,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=names,
                per_channel=True,  # one scale for each output: the same speed, and a smaller error
                weight_type=quantization.QuantType.QInt8,
                use_external_data_format=large,
            )
        except OnnxExportError:
            raise
        except Exception as error:  # whatever the quantizer raises
            raise OnnxExportError(f"ONNX Runtime cannot quantize this graph: {error}") from error
        for path in (DATA_FILE, GRAPH_FILE):
            if (Path(pending) / path).exists():
                os.replace(Path(pending) / path, folder / path)
    return [path for path in (source, folder / DATA_FILE) if path.exists()]


def _products(model: Any) -> tuple[list[Any], list[Any]]:
    """The products with a frozen weight: those that are as wide as what they get or wider, and the narrowing ones."""
    shapes = {one.name: tuple(one.dims) for one in model.graph.initializer}
    frozen = [
        (node, shapes[node.input[1]])
        for node in model.graph.node
        if node.op_type == "MatMul" and len(shapes.get(node.input[1], ())) == 2
    ]
    return [node for node, (rows, columns) in frozen if rows <= columns], [
        node for node, (rows, columns) in frozen if rows > columns
    ]
