"""What a user installs and what `import bitfit_hf` does to their process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What the import may not pull in: each is slow or an extra, and is imported by the function that needs it.
HEAVY = {"matplotlib", "datasets", "pandas", "sklearn", "typer", "rich", "sentence_transformers", "trl"}

# Runs in a process of its own. The imports at its top are what `bitfit_hf` builds on; what they do to the process is
# theirs.
IMPORT_PROBE = """
import json, locale, logging, os, random, socket, sys, threading, time, warnings

import numpy, peft, torch, transformers
import transformers.trainer, transformers.trainer_optimizer
from transformers import Trainer, TrainerCallback  # modules of transformers are imported on first use

opened = []
def no_socket(*args, **kwargs):
    opened.append(repr(args))
    raise OSError("no network during an import")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = no_socket

def loggers():
    known = logging.root.manager.loggerDict
    named = {name: log for name, log in known.items() if isinstance(log, logging.Logger)}
    # A logger that a module merely asks for by name has no level and no handlers: it changes nothing.
    return {
        name: (log.level, [repr(handler) for handler in log.handlers], log.propagate, log.disabled)
        for name, log in {"": logging.root, **named}.items()
        if log.level or log.handlers or not log.propagate or log.disabled
    }

def state():
    return {
        **{f"environment variable {name}": value for name, value in os.environ.items()},
        "working directory": os.getcwd(),
        "loggers": loggers(),
        "disabled log level": logging.root.manager.disable,
        "transformers verbosity": transformers.logging.get_verbosity(),
        "warning filters": [repr(entry) for entry in warnings.filters],
        "showwarning": repr(warnings.showwarning),
        "torch default dtype": repr(torch.get_default_dtype()),
        "torch default device": repr(torch.get_default_device()),
        "torch gradients": torch.is_grad_enabled(),
        "torch threads": torch.get_num_threads(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch generator": torch.random.get_rng_state().tolist(),
        "numpy generator": repr(numpy.random.get_state()),
        "python generator": hash(random.getstate()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "excepthook": repr(sys.excepthook),
        "import path": list(sys.path),
        "optimizers": {str(name): id(how) for name, how in transformers.trainer_optimizer._OPTIMIZER_HANDLERS.items()},
        "Trainer": {name: id(value) for name, value in vars(Trainer).items()},
        "callbacks": [str(callback) for callback in transformers.trainer.DEFAULT_CALLBACKS],
        "locale": locale.setlocale(locale.LC_ALL),
    }

before, modules = state(), set(sys.modules)
started = time.process_time()
import bitfit_hf
seconds = time.process_time() - started
bitfit_hf.BitFitCallback(bitfit_hf.BitFitConfig(), head_learning_rate=1e-3)  # nor does making one
after = state()
print(json.dumps({
    "changed": {
        key: [str(before.get(key))[:300], str(after.get(key))[:300]]
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    },
    "compared": [key for key in before if not key.startswith("environment variable")],
    "opened": opened,
    "seconds": seconds,
    "new": sorted(set(sys.modules) - modules),
    "file": bitfit_hf.__file__,
}))
"""


def library_files() -> set[str]:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bitfit_hf").rglob("*") if path.is_file()}
    return {name for name in files if "__pycache__" not in name}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    """The names in a wheel, built from a copy of the sources: a build in the tree would pick up earlier leavings."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bitfit_hf", "recipes", "tests", "model_cards"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    built = subprocess.run([*command, "-w", target, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_holds_the_library_and_nothing_else(wheel_names):
    payload = {name for name in wheel_names if ".dist-info/" not in name}
    assert payload == library_files()
    assert len(payload) == len([name for name in wheel_names if ".dist-info/" not in name]), "a name occurs twice"
    assert "bitfit_hf/__init__.py" in payload


def test_wheel_metadata_holds_the_licence(wheel_names):
    metadata = {name.split(".dist-info/")[1] for name in wheel_names if ".dist-info/" in name}
    expected = {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}
    assert metadata - {"entry_points.txt"} == expected


@pytest.fixture(scope="module")
def import_report() -> dict:
    command = [sys.executable, "-c", IMPORT_PROBE]
    probe = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=300)
    assert probe.returncode == 0, probe.stderr
    return json.loads(probe.stdout.splitlines()[-1])


def test_import_changes_no_global_state(import_report):
    assert len(import_report["compared"]) == 21
    assert import_report["changed"] == {}
    assert import_report["opened"] == []


def test_import_is_light(import_report):
    assert Path(import_report["file"]).parent.name == "bitfit_hf"
    top_level = {name.partition(".")[0] for name in import_report["new"]}
    assert top_level & HEAVY == set()
    # About 0.1 s of a laptop's processor; the bound only has to catch a heavy import or work done at import time.
    assert import_report["seconds"] < 3.0
