"""FSDP2 on two CPU processes, where it really shards: saves are whole, and load on one device and in slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import HELPERS, run_python, torchrun
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from trainer_tester import fresh

from bitfit_hf import BitFitConfig
from bitfit_hf.errors import UnsupportedLayerError

SCRIPT = HELPERS / "sharded_run.py"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    result = run_python(*torchrun(), SCRIPT, folder)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def facts(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads(folder.with_name(f"{folder.name}-{rank}.json").read_text())


def tensors(folder: Path, part: str, rank: int = 0) -> Tensors:
    found = load_file(folder.with_name(f"{folder.name}-{rank}.safetensors"))
    return {key.removeprefix(f"{part}/"): value for key, value in found.items() if key.startswith(f"{part}/")}


def without_dead(values: Tensors) -> Tensors:
    """Without the key biases, whose gradient is rounding noise that Adam turns into steps."""
    return {name: value for name, value in values.items() if ".key." not in name}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["float32/bert", "float32/slices"])
def test_sharded_training_equals_one_device(case: str, runs: Path) -> None:
    found = [tensors(runs / case, "sharded", rank) for rank in range(2)]
    expected = without_dead(tensors(runs / case, "alone"))
    for gathered in found:
        assert without_dead(gathered).keys() == expected.keys()
        for name, tensor in expected.items():
            assert (gathered[name] - tensor).abs().max() < 1e-5
            assert tensor.abs().max() > 1e-3
    for rank in range(2):
        seen = facts(runs / case, rank)
        assert seen["kinds"] == ["DTensor"]
        assert 0.4 < seen["share"] < 0.6  # each process holds half of the weights
        assert seen["num_parameters"] == seen["expected"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["float32/bert", "float32/slices", "bfloat16/bert"])
def test_saves_are_whole_and_written_by_one_process(case: str, runs: Path) -> None:
    saved = load_file(runs / f"{case}-0" / "adapter_model.safetensors")
    gathered = tensors(runs / case, "sharded")
    assert saved.keys() == gathered.keys()
    assert all(torch.equal(saved[name], gathered[name]) for name in saved)
    assert facts(runs / case)["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert facts(runs / case, 1)["files"] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["float32/bert", "float32/slices", "bfloat16/bert"])
def test_saves_load_on_one_device_and_in_slices(case: str, runs: Path) -> None:
    logits = tensors(runs / case, "logits")
    assert set(logits) == {"sharded", "alone", "one device", "sharded again"}
    tolerance = 2e-6 if case.startswith("float32") else 1e-2
    for way in ("one device", "sharded again"):
        assert (logits[way] - logits["sharded"]).abs().max() <= tolerance
    again, gathered = tensors(runs / case, "again"), tensors(runs / case, "sharded")
    assert all(torch.equal(again[name], gathered[name]) for name in gathered)


@pytest.mark.slow
def test_a_sharded_model_is_checked_to_be_the_right_base(runs: Path) -> None:
    assert [facts(runs / "float32" / "bert", rank)["another base"] for rank in range(2)] == ["refused"] * 2


@pytest.mark.slow
def test_bf16_base_goes_with_float32_deltas(runs: Path) -> None:
    case = runs / "bfloat16" / "bert"
    assert facts(case)["dtypes"] == ["torch.float32"]
    assert _correlation(case) > 0.99


@pytest.mark.slow
def test_mixed_precision_of_fsdp_trains_deltas_and_head(runs: Path) -> None:
    case = runs / "mixed" / "bert"
    assert facts(case)["dtypes"] == ["torch.float32"]
    assert _correlation(case) > 0.99


def _correlation(case: Path) -> float:
    found, expected = (without_dead(tensors(case, part)) for part in ("sharded", "alone"))
    names = [name for name in expected if "bitfit_" in name]
    assert names
    flat = [torch.cat([values[name].flatten() for name in names]) for values in (found, expected)]
    return float(torch.corrcoef(torch.stack(flat))[0, 1])


def test_tensor_parallelism_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fresh()
        query = model.get_submodule("bert.encoder.layer.0.attention.self.query")
        query.bias = nn.Parameter(distribute_tensor(query.bias.data, init_device_mesh("cpu", (1,))))
        with pytest.raises(UnsupportedLayerError, match=r"self\.query\.bias .* tensor parallelism"):
            get_peft_model(model, BitFitConfig())
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "engine"),
    [("fsdp2", "FSDP2"), ("deepspeed_zero2", "DeepSpeed ZeRO-2"), ("deepspeed_zero3", "DeepSpeed ZeRO-3")],
)
def test_a_stock_trainer(config: str, engine: str, tmp_path: Path) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    script = SCRIPT.with_name("sharded_trainer_run.py")
    for command, name in (([], "one"), (torchrun(), "two")):
        (tmp_path / name).mkdir()
        result = run_python(*command, script, tmp_path / name, config)
        assert result.returncode == 0, result.stderr[-4000:]
    alone = json.loads((tmp_path / "one" / "facts-0.json").read_text())
    for rank in range(2):
        seen = json.loads((tmp_path / "two" / f"facts-{rank}.json").read_text())
        for kind in ("whole", "resumed"):
            assert seen[kind]["engine"] == engine
            assert seen[kind]["sharded"] == (config != "deepspeed_zero2")
            assert seen[kind]["losses"] == pytest.approx(alone["whole"]["losses"], abs=1e-5)
        assert "get_peft_model(model, BitFitConfig(...))" in seen["stock"]
    one, whole, resumed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one/whole", "two/whole", "two/resumed")
    )
    assert whole.keys() == resumed.keys() == one.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert max((whole[name] - value).abs().max() for name, value in without_dead(one).items()) < 1e-5
