"""int8 weights for a graph."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from ...errors import OnnxExportError
from .folder import DATA_FILE, GRAPH_FILE, GraphInfo, sha256
from .packages import package


def quantized_copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Writes the folder of a float32 graph anew with int8 weights; tracing takes far longer than that.

    Args:
        source (`str` or `os.PathLike`): A folder that [`export_onnx`] wrote.
        target (`str` or `os.PathLike`): Where to; made if it does not exist.

    Raises:
        [`OnnxGraphError`]: There is no sound graph in `source`.
        [`OnnxExportError`]: It cannot be done.
    """
    info = GraphInfo.read(source)
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in info.sha256:
        shutil.copyfile(Path(source) / name, target / name)
    files = quantize(target)
    replace(info, weights="int8", sha256={path.name: sha256(path) for path in files}).write(target)


def quantize(folder: Path) -> list[Path]:
    """Quantizes the weights of a graph's products to 8 bits, in place; what the products get is quantized as it comes.

    Only products with a frozen weight are: those inside attention, of two activations, stay float32, as do biases.

    Args:
        folder (`Path`): With `model.onnx`.

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
