"""From a torch module to an ONNX file: one way to call the exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import OnnxExportError
from .folder import DATA_FILE, GRAPH_FILE
from .packages import package

_LARGE = 2**29  # bytes of weights; a file of protobuf ends at 2 GiB, and is read into memory whole
_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "torch.export")


def trace(
    module: nn.Module,
    args: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    folder: Path,
) -> list[Path]:
    """Writes what a module computes as `model.onnx`.

    Args:
        module (`nn.Module`): The module.
        args (`tuple`): Arguments to trace it with.
        dynamic (`tuple`): Their dimensions that may be others, as `torch.export` takes them.
        inputs (`Sequence[str]`), outputs (`Sequence[str]`): Names of the tensors among arguments and results.
        folder (`Path`): Where to.

    Returns:
        `list[Path]`: The files.

    Raises:
        [`OnnxExportError`]: The exporter cannot do it.
        [`MissingDependencyError`]: It is not installed.
    """
    package("onnx"), package("onnxscript")
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    path = folder / GRAPH_FILE
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                module.eval(),
                args,
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=list(inputs),
                output_names=list(outputs),
                verbose=False,
            )
            program.save(path, external_data=size > _LARGE)
    except Exception as error:  # whatever stops the exporter, in all of its kinds
        raise OnnxExportError(f"torch's ONNX exporter cannot export this model: {error}") from error
    return [path for path in (path, folder / DATA_FILE) if path.exists()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what the exporter says about packages that nothing here needs."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
