"""Private training in two processes under DDP against one process that draws the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import LAUNCHERS, launch_on_cpu
from private_run import CASES
from safetensors.torch import load_file
from torch import nn
from trainer_tester import furthest, same

from bitfit_hf.trainer.private.gradients import PrivateSum, generator_noise
from bitfit_hf.trainer.private.sampling import PoissonBatches, draw

SCRIPT = "private_run.py"
SAME = [case for case in CASES if case != "secure"]


def facts(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def tensors(folder: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-{rank}.safetensors")


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_draws(tmp_path: Path) -> None:
    one = launch_on_cpu([], SCRIPT, tmp_path / "one", batch_size=4)
    two = launch_on_cpu(LAUNCHERS["accelerate"](), SCRIPT, tmp_path / "two", batch_size=2)
    for case in CASES:
        alone, ranks = facts(one, case), [facts(two, case, rank) for rank in range(2)]
        assert alone["processes"] == 1
        assert [rank["processes"] for rank in ranks] == [2, 2]
        assert [rank["wrapped by"] for rank in ranks] == ["DistributedDataParallel"] * 2
        assert same(tensors(two, case, 0), tensors(two, case, 1)), case
        assert ranks[0]["privacy"] == ranks[1]["privacy"] == alone["privacy"]
        assert alone["privacy"]["sample_rate"] == 4 / 24
        assert (
            len(alone["sizes"]) == len(ranks[0]["sizes"]) == 8 * CASES[case][1].get("gradient_accumulation_steps", 1)
        )
    for case in SAME:
        updates = [sum(facts(one, case)["sizes"]), sum(sum(facts(two, case, rank)["sizes"]) for rank in range(2))]
        assert updates[0] == updates[1] > 0, "the same examples are drawn"
        # Noise too: made once, of the same size, whatever the number of processes.
        assert furthest(tensors(one, case), tensors(two, case)) < 1e-6, case
    sizes = [pair for case in CASES for pair in zip(*(facts(two, case, rank)["sizes"] for rank in range(2)))]
    assert any(0 in pair and max(pair) > 0 for pair in sizes), "one process without an example, the other with some"
    assert any(0 < min(pair) != max(pair) for pair in sizes), "uneven ones"
    for folder in (one, two):
        assert same(tensors(folder, "noised"), tensors(folder, "noised-resumed"))
        assert facts(folder, "noised-resumed")["privacy"] == facts(folder, "noised")["privacy"]


def test_each_example_is_one_processes_own() -> None:
    def batches(process: int, **values: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        return list(PoissonBatches(0.1, 2, lambda: draw(101, 0.1, generator), process=process, processes=3, **values))

    whole = torch.Generator().manual_seed(3)
    parts = [batches(process) for process in range(3)]
    by_length = [batches(process, lengths=[i % 7 for i in range(101)]) for process in range(3)]
    assert [len(own) for own in parts] == [20] * 3
    for update in range(10):
        drawn = draw(101, 0.1, whole)
        for found in (parts, by_length):
            own = [found[process][2 * update] + found[process][2 * update + 1] for process in range(3)]
            assert sorted(example for part in own for example in part) == drawn
            assert all(example % 3 == process for process in range(3) for example in own[process])
        for own in by_length:
            lengths = [i % 7 for part in own[2 * update : 2 * update + 2] for i in part]
            assert lengths == sorted(lengths, reverse=True)


def test_noise_is_added_once_over_processes() -> None:
    parameters = [nn.Parameter(torch.zeros(50_000)), nn.Parameter(torch.zeros(2, 5))]
    first, second = PrivateSum(parameters, 2.0), PrivateSum(parameters, 2.0)
    for private in (first, second):
        private.add({parameters[1]: torch.ones(3, 2, 5) * 0.1}, torch.ones(3))
    sent: list[torch.Tensor] = []
    second.release(1.5, None, 10.0, reduce=lambda total: sent.append(total) or total)
    noise = generator_noise(torch.Generator().manual_seed(0))
    released: list[torch.Tensor] = []
    first.release(
        1.5,
        noise,
        10.0,
        reduce=lambda total: total + sent[0],
        broadcast=lambda total: released.append(total) or total,
    )
    assert float(parameters[0].grad.std()) == pytest.approx(1.5 * 2.0 / 10.0, rel=0.02)
    assert float(parameters[1].grad.mean()) == pytest.approx(6 * 0.1 / 10.0, abs=4 * 0.3 / 10**0.5)
    assert float(sent[0][-10:].mean()) == pytest.approx(0.3, rel=1e-5), "the other process adds none"
    second.release(1.5, None, 10.0, broadcast=lambda _: released[0])
    assert float(parameters[0].grad.std()) == pytest.approx(1.5 * 2.0 / 10.0, rel=0.02)
