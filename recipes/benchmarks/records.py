"""What the record of a serving benchmark says besides its figures, and writing it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common.record import hardware, versions


def circumstances(commit: str | None, dirty: bool) -> dict[str, Any]:
    """The machine, how busy it is, the versions and the commit.

    Args:
        commit (`str`, *optional*), dirty (`bool`):
            What `checkout()` said when the run began, since files may change meanwhile.
    """
    return {
        "hardware": hardware(1, torch.device("cpu")),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
    }


def write_record(record: Mapping[str, Any], output: str | None, plot: Callable[[dict[str, Any], Path], None]) -> None:
    """Writes a record as JSON, and its picture beside it.

    Args:
        record (`Mapping[str, Any]`): The figures.
        output (`str`, *optional*): The JSON file; without it nothing is written.
        plot (`Callable`): Draws the record to a file.
    """
    if output is None:
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot(dict(record), path.with_suffix(".png"))
