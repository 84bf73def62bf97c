"""int8 weights for a graph."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import OnnxExportError
from .folder import DATA_FILE, GRAPH_FILE, GraphInfo, sha256
from .packages import package


def quantized_copy(source: str | os.PathLike[str], target: str | os.PathLike[str], *, mlp: bool = False) -> None:
    """Writes the folder of a float32 graph anew with int8 weights; tracing takes far longer than that.

    Args:
        source (`str` or `os.PathLike`): A folder that [`export_onnx`] wrote.
        target (`str` or `os.PathLike`): Where to; made if it does not exist.
        mlp (`bool`, *optional*, defaults to `False`): See [`quantize`].

    Raises:
        [`OnnxGraphError`]: There is no sound graph in `source`.
        [`OnnxExportError`]: It cannot be done.
    """
    info = GraphInfo.read(source)
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in info.sha256:
        shutil.copyfile(Path(source) / name, target / name)
    files = quantize(target, mlp=mlp)
    replace(info, weights="int8", sha256={path.name: sha256(path) for path in files}).write(target)


def quantize(folder: Path, *, mlp: bool = False) -> list[Path]:
    """Quantizes the weights of a graph's products to 8 bits, in place; what the products get is quantized as it comes.

    Those are attention's projections, which are as wide as they are high. The MLP's products are the larger part of
    the time, and of the error: what they get has a few values far beyond all others, and one scale for all of it. The
    products of two activations stay float32, as do biases.

    Args:
        folder (`Path`): With `model.onnx`.
        mlp (`bool`, *optional*, defaults to `False`): The MLP's products too, and all others with a frozen weight.

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
            quantization.quantize_dynamic(
                model,
                target,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=_products(model, mlp),
                per_channel=True,  # one scale for each output: the same speed, and a smaller error
                weight_type=quantization.QuantType.QInt8,
                use_external_data_format=large,
            )
        except Exception as error:  # whatever the quantizer raises
            raise OnnxExportError(f"ONNX Runtime cannot quantize this graph: {error}") from error
        for path in (DATA_FILE, GRAPH_FILE):
            if (Path(pending) / path).exists():
                os.replace(Path(pending) / path, folder / path)
    return [path for path in (source, folder / DATA_FILE) if path.exists()]


def _products(model: Any, mlp: bool) -> list[str]:
    """Names of the products with a frozen weight: the square ones, or all."""
    shapes = {one.name: tuple(one.dims) for one in model.graph.initializer}
    weights = {node.name: shapes.get(node.input[1]) for node in model.graph.node if node.op_type == "MatMul"}
    chosen = [name for name, shape in weights.items() if shape and len(shape) == 2 and (mlp or shape[0] == shape[1])]
    if not chosen:  # to the quantizer an empty list means all
        raise OnnxExportError("No weight of this graph can be quantized to 8 bits.")
    return chosen
