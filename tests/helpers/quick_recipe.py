"""A recipe that trains nothing: for tests of sweeps, which need runs that are quick and known beforehand.

It says in the file `QUICK_LOG` when a run begins and ends. A file `QUICK_LOG` + ".block" makes runs with the learning
rate written in it wait until they are killed, and one with ".fail" makes them fail.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

SCORES = {1e-4: 0.50, 1e-3: 0.75, 1e-2: 0.25}  # by learning rate; the middle one is the best


def score(learning_rate: float, seed: int, method: str) -> float:
    return SCORES[learning_rate] + 0.01 * seed**2 - (0.1 if method == "frozen" else 0.0)


def record(learning_rate: float, seed: int, method: str, value: float, **more: Any) -> dict[str, Any]:
    """A record in the form of [`common.record.RunRecord`]."""
    metrics = {"accuracy": value, "f1": value / 2, "loss": 1.0}
    history = [
        {"epoch": epoch, "step": 10 * epoch, "train_loss": 1.0, "eval": metrics, "train": {"accuracy": value + 0.1}}
        for epoch in (1.0, 2.0)
    ]
    return {
        "recipe": "quick_recipe",
        "task": "quick",
        "model": "tiny",
        "method": method,
        "learning_rate": learning_rate,
        "seed": seed,
        "config": {},
        "history": history,
        "metric": "accuracy",
        "metrics": {"final": metrics | {"accuracy": value - 0.05}, "best": metrics},
        "best_epoch": 1.0,
        "trainable": {"body": 26112, "head": 770, "base": 22713216},
        "bytes": 133377,
        "seconds": 1.0,
        "data": {},
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "dirty": False,
        "hardware": {"cpu": "a processor", "cores": 1},
        "notes": {},
        "finished": "2026-01-01T00:00:00+00:00",
    } | more


def _told(ending: str, learning_rate: float) -> bool:
    path = Path(os.environ["QUICK_LOG"] + ending)
    return path.exists() and float(path.read_text()) == learning_rate


def _log(*words: object) -> None:
    with open(os.environ["QUICK_LOG"], "a") as file:  # one short line: appended in one piece
        file.write(" ".join(map(str, words)) + "\n")


def main(argv: list[str]) -> None:
    options = dict(zip(argv[::2], argv[1::2]))
    rate, seed, method = float(options["--learning_rate"]), int(options["--seed"]), options["--method"]
    name = f"{options.get('--name', 'quick')}/{method}/{rate:g}/{seed}"
    _log("begin", name)
    folder = Path(options["--output_dir"])
    (folder / "half-finished").write_text("nothing worth keeping")
    while _told(".block", rate):
        time.sleep(0.02)
    if _told(".fail", rate):
        raise RuntimeError("this run was told to fail")
    time.sleep(float(options.get("--pause", 0)))
    made = record(rate, seed, method, score(rate, seed, method))
    (folder / "run.json").write_text(json.dumps(made))
    _log("end", name)
