"""Two processes on the CPU under DDP against one with twice the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launching import HELPERS, LAUNCHERS, launch_on_cpu, run_python, torchrun
from safetensors.torch import load_file
from trainer_tester import IN_PLACE, WAYS, files, furthest, same

SCRIPT = "distributed_run.py"
RUNS = [(way, kind) for way in WAYS for kind in ("whole", "resumed")]


def facts(folder: Path, way: str, kind: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{way}-{kind}-{rank}.json").read_text())


def tensors(folder: Path, way: str, kind: str, rank: int = 0) -> Any:
    return load_file(folder / f"{way}-{kind}-{rank}.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_on_cpu([], SCRIPT, tmp_path_factory.mktemp("one") / "run", batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_equal_one_with_twice_the_batch(launcher: str, one_process: Path, tmp_path: Path) -> None:
    two = launch_on_cpu(LAUNCHERS[launcher](), SCRIPT, tmp_path / "run", batch_size=4)
    for way, kind in RUNS:
        alone = facts(one_process, way, kind)
        ranks = [facts(two, way, kind, rank) for rank in range(2)]
        assert alone["processes"] == 1
        assert [rank["processes"] for rank in ranks] == [2, 2]
        assert [rank["wrapped by"] for rank in ranks] == ["DistributedDataParallel"] * 2

        first, second = (tensors(two, way, kind, rank) for rank in range(2))
        assert same(first, second)
        # The gradient of a key bias is rounding noise, which Adam turns into steps.
        found, expected = (
            {name: tensor for name, tensor in values.items() if ".key." not in name}
            for values in (first, tensors(one_process, way, kind))
        )
        assert furthest(found, expected) < 1e-5
        assert len(found) == len(first) - 2
        assert all(tensor.abs().max() > 1e-3 for tensor in found.values())
        assert ranks[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        # The first process saves, the other one does not.
        steps = ["checkpoint-3", "checkpoint-6"] if kind == "whole" else ["checkpoint-6"]
        assert [rank["written"] for rank in ranks] == [steps if way == IN_PLACE else [], []]
    for way in WAYS:
        assert same(tensors(two, way, "whole"), tensors(two, way, "resumed"))
        found = files(two / way / "checkpoint-6")
        assert "adapter_model.safetensors" in found
        assert ("model.safetensors" in found) == (way == IN_PLACE)
        assert sum(size for name, size in found.items() if name.endswith(".safetensors")) < 20_000


def test_gradients_are_all_that_is_sent_and_the_best_model_is_loaded(tmp_path: Path) -> None:
    result = run_python(*torchrun(), HELPERS / "ddp_run.py", tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    found = [json.loads((tmp_path / f"bytes-{way}-{rank}.json").read_text()) for way in WAYS for rank in range(2)]
    assert len(found) == 4
    for seen in found:
        assert seen["processes"] == 2
        assert seen["bytes"] == [4 * seen["trainable"]] * 6
        assert seen["best"] != "checkpoint-6"
        assert seen["is the best"]
