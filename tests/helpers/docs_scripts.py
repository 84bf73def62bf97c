"""The scripts of `docs/` as modules. They lie in no package, and each finds those beside it by their plain names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).resolve().parents[2] / "docs"


def script(place: str) -> ModuleType:
    """The script `docs/{place}.py`. By its path: a folder on the search path would hide the package `build`."""
    name = Path(place).name
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{place}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


blocks = script("blocks")  # `examples` uses it
examples = script("examples")


def python_of(text: str) -> list[str]:
    """The Python blocks of a text in Markdown."""
    return [block.code for block in blocks.fenced(text, "") if block.language in blocks.PYTHON]
