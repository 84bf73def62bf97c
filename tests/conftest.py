"""Shared fixtures. The environment is set before anything imports `huggingface_hub`, which reads it only once."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile

_HF_HOME = tempfile.mkdtemp(prefix="bitfit-tests-hf-home-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(_name, None)  # each would win over HF_HOME
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
    os.environ.pop(_name, None)
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_TOKEN_PATH=os.path.join(_HF_HOME, "no-token-here"),
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    WANDB_MODE="disabled",
    OMP_NUM_THREADS="1",
)
# For `from architectures import ...`, also where pytest is run without the project's configuration.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

pytest_plugins = ["browser_fixtures", "command_line", "hub_fixtures", "recipe_fixtures", "serving_fixtures"]


def pytest_collection_finish() -> None:
    """Takes half a million objects, of torch and of what else was imported, out of the collector's sight.

    Each `Trainer.train` collects all garbage, and so do many of the tests: that took longer than what they are about.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it and on whichever worker."""
    import random

    import numpy

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def hf_home() -> str:
    """The session's own, empty Hugging Face cache folder."""
    return _HF_HOME
