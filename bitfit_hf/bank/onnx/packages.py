"""The packages of the extra `onnx`, imported when something needs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ...errors import MissingDependencyError


def package(name: str) -> Any:
    """Imports `onnx`, `onnxruntime`, `onnxscript` or a module of one of them.

    Raises:
        [`MissingDependencyError`]: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f'{name.partition(".")[0]} is needed for ONNX and is not installed: `pip install "bitfit-hf[onnx]"`.'
        ) from error
