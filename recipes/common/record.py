"""One JSON per run: what was asked for, what came out, and what it was made with."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import bitfit_hf
from bitfit_hf.storage.files import write_bytes
from bitfit_hf.training_run import installed_versions

PROJECT = Path(__file__).resolve().parents[2]
# What a run consists of beside its packages: a result of files that no commit holds is called dirty.
CODE = ("bitfit_hf/**/*.py", "recipes/**/*.py", "recipes/**/*.yaml", "pyproject.toml")


def versions() -> dict[str, str]:
    """Of Python and the packages; of this project also where it is not installed."""
    return installed_versions() | {"bitfit-hf": bitfit_hf.__version__}


@dataclass
class RunRecord:
    """
    A run and its provenance. Holds no path of the machine and nothing about its user.

    Args:
        recipe (`str`): The script, without `.py`.
        task (`str`): What was learned, such as `"rte"`.
        model (`str`): The pre-trained model's name.
        method (`str`): As it was given to `make_method`.
        learning_rate (`float`): Highest value of the schedule.
        seed (`int`): Of everything random.
        config (`dict[str, Any]`): All arguments.
        history (`list[dict[str, Any]]`): One entry per evaluation: `epoch`, `step`, `seconds` and
            `processor_seconds` of training until then, `train_loss` (mean of the last epoch), `eval` (metrics),
            `constant` (whether all answers were the same; null where that cannot be said), and `train` (metrics on
            training rows) where asked for.
        metric (`str`): The one that chooses the best epoch.
        metrics (`dict[str, dict[str, float]]`): `final`, of what is saved, and `best`, of the best epoch. With
            `dev_halves` those that begin with `report_` are of the half that nothing was chosen on.
        best_epoch (`float`): Chosen on the evaluation rows, as the paper does; with `dev_halves` on their first half.
        trainable (`dict[str, int]`): Numbers of parameters: trained in `body` and `head`, and all of the `base`.
        bytes (`int`): What the task needs on disk beside the base.
        seconds (`float`), processor_seconds (`float`): Time of training, without evaluations: on the clock on the
            wall, and of the first process's processors together.
        data (`dict[str, Any]`): `source`, and number of `rows` by split.
        model_revision (`str`, *optional*): Commit of the pre-trained model, where it is from the Hub.
        versions (`dict[str, str]`): Of Python and the packages.
        commit (`str`, *optional*): Of the project, if it is a checkout.
        dirty (`bool`, *optional*): Whether code or configurations differ from that commit.
        hardware (`dict[str, Any]`): `cpu`, `cores` (usable), `threads`, `device`, `processes` (that really ran),
            the `engine` that they trained with and the `precision` of its autocast.
        notes (`dict[str, Any]`, *optional*): Further facts of the recipe.
        finished (`str`): When, in UTC.
    """

    recipe: str
    task: str
    model: str
    method: str
    learning_rate: float
    seed: int
    config: dict[str, Any]
    history: list[dict[str, Any]]
    metric: str
    metrics: dict[str, dict[str, float]]
    best_epoch: float
    trainable: dict[str, int]
    bytes: int
    seconds: float
    processor_seconds: float
    data: dict[str, Any]
    model_revision: str | None = None
    versions: dict[str, str] = field(default_factory=versions)
    commit: str | None = None
    dirty: bool | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    finished: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def write(self, path: str | Path) -> None:
        """Writes the record; after a crash at any moment the file is whole, the old one or the new."""
        text = json.dumps(_finite(asdict(self)), indent=1, allow_nan=False) + "\n"
        write_bytes(path, text.encode())

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """
        Reads a record.

        Raises:
            `ValueError`: The file is not a record: which fields are missing, unknown or of the wrong type.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a record of a run: {error}. Delete it to run again.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not a record of a run: it holds a {type(values).__name__}.")
        known = {item.name: item for item in fields(cls)}
        problems = [f"no `{name}`" for name in known if name not in values]
        problems += [f"unknown `{name}`" for name in values if name not in known]
        for name, (wanted, kinds) in _KINDS.items():
            value = values.get(name)
            if name in values and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                problems.append(f"`{name}` must be {wanted}, is {value!r:.60}")
        if not problems and not {"final", "best"} <= values["metrics"].keys():
            problems.append(f"`metrics` must hold final and best, holds {', '.join(values['metrics']) or 'nothing'}")
        if problems:
            raise ValueError(f"{path} is not a record of a run: {'; '.join(problems)}. Delete it to run again.")
        return cls(**values)


_TEXT, _NUMBER, _MAPPING = ("text", (str,)), ("a number", (int, float)), ("a mapping", (dict,))
_WHOLE = ("a whole number", (int,))
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(("recipe", "task", "model", "method", "metric", "finished"), _TEXT),
    **dict.fromkeys(("learning_rate", "best_epoch", "seconds", "processor_seconds"), _NUMBER),
    **dict.fromkeys(("seed", "bytes"), _WHOLE),
    **dict.fromkeys(("config", "metrics", "trainable", "data", "versions", "hardware", "notes"), _MAPPING),
    "history": ("a list", (list,)),
    **dict.fromkeys(("commit", "model_revision"), ("text or null", (str, type(None)))),
    "dirty": ("true, false or null", (bool, type(None))),
}


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: a number that is none, such as the loss of a run that diverged, becomes null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments without what would name the machine or its user: absolute paths are `"<local path>"`."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, str) and (os.path.isabs(value) or value.startswith(("~", ".."))):
            return "<local path>"
        return value

    return {name: clean(value) for name, value in config.items()}


def checkout() -> tuple[str | None, bool | None]:
    """Commit of the project and whether its code differs from it; `(None, None)` where it is no git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != PROJECT:  # a copy inside another project's checkout
        return None, None
    changes = git("status", "--porcelain", "--untracked-files=all", "--", *(f":(glob){pattern}" for pattern in CODE))
    return git("rev-parse", "HEAD"), None if changes is None else bool(changes)


def hardware(processes: int, device: torch.device) -> dict[str, Any]:
    """What a run used: the processor, its usable cores, threads of a process, the device, and how many processes."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
