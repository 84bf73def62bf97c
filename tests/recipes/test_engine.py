"""Configs for `accelerate launch`, and the check that the engine which runs is the one that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from common import engine
from common.engine import DDP, SINGLE, Engine, EngineError, asked_of_config, asked_of_launcher, check_engine
from launching import HELPERS, run_python
from torch import nn
from trainer_tester import WRAPPED, prepared, trainer_for

SCRIPT = HELPERS / "engine_run.py"
ONE = {"cpu_2_processes": (DDP, 2, "cpu"), "one_gpu": (SINGLE, 1, "GPU"), "ddp": (DDP, 2, "GPU")}
SHARDED = {"fsdp2": "FSDP2", "deepspeed_zero2": "DeepSpeed ZeRO-2", "deepspeed_zero3": "DeepSpeed ZeRO-3"}
EXPECTED = {**ONE, **{name: (kind, 2, "GPU") for name, kind in SHARDED.items()}}


def test_every_config_is_known() -> None:
    assert {file.stem for file in engine.CONFIGS.glob("*.yaml")} == set(EXPECTED)
    assert len(EXPECTED) == 6


@pytest.mark.parametrize("name", EXPECTED)
def test_configs_ask_for_their_engine(name: str) -> None:
    assert asked_of_config(name) == Engine(*EXPECTED[name])
    assert asked_of_config(str(engine.CONFIGS / f"{name}.yaml")) == asked_of_config(f"{name}.yaml")


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_takes_the_configs(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = engine.CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes == EXPECTED[name][1]
    assert path.read_text().startswith("# ")  # says when to use it
    known = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}
    values = yaml.safe_load(path.read_text())
    assert {key for key in values if key.endswith("_config")} == set(known.values()) & {
        known.get(values["distributed_type"])
    }


def test_unknown_config() -> None:
    with pytest.raises(EngineError, match=r"fsdp3: there is no such config.*cpu_2_processes"):
        asked_of_config("fsdp3")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, Engine(SINGLE, 1)),
        ({"WORLD_SIZE": "4"}, Engine(DDP, 4)),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, Engine("FSDP2", 2)),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            Engine("DeepSpeed ZeRO-3", 2),
        ),
    ],
)
def test_what_the_launcher_was_asked_for(environment: dict[str, str], expected: Engine | None) -> None:
    assert asked_of_launcher(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, r"This run is one process, cpu, but `accelerate launch` .* was asked for DDP on 2 proc"),
        ({"MASTER_ADDR": "127.0.0.1"}, "asked for several processes and started one.*cpu_2_processes.yaml"),
        (
            {"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            "asked for FSDP2 on 1 process.*shards a model on GPUs only",
        ),
        (
            {"BITFIT_ENGINE": "deepspeed_zero3"},
            "deepspeed_zero3 asks for DeepSpeed ZeRO-3 on 2 processes",
        ),
        ({"BITFIT_ENGINE": "cpu_2_processes"}, "BITFIT_ENGINE=cpu_2_processes asks for DDP on 2 processes, cpu"),
    ],
)
def test_another_engine_than_asked_for_is_an_error(environment: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=message):
        check_engine(trainer_for(prepared(WRAPPED), tmp_path), environment)


def test_one_process_is_what_it_is(tmp_path: Path) -> None:
    trainer = trainer_for(prepared(WRAPPED), tmp_path, max_steps=1)
    assert check_engine(trainer, {}) == Engine(SINGLE, 1, "cpu")
    with pytest.raises(EngineError, match="BITFIT_ENGINE=one_gpu asks for one process, GPU"):
        check_engine(trainer, {"BITFIT_ENGINE": "one_gpu", "WORLD_SIZE": "1"})
    trainer.train()


def test_a_model_that_is_wrapped_otherwise_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = trainer_for(prepared(WRAPPED), tmp_path, max_steps=1)
    check_engine(trainer, {})
    monkeypatch.setattr(engine, "wrapper", lambda model: DDP)
    with pytest.raises(EngineError, match="was to run as one process, cpu, but the model is wrapped for DDP"):
        trainer.train()


def test_wrapper_of_a_plain_model() -> None:
    assert engine.wrapper(nn.Linear(2, 2)) == SINGLE


def launch(folder: Path, *arguments: object, **environment: str) -> Any:
    folder.mkdir(exist_ok=True)
    return run_python("-m", "accelerate.commands.launch", *arguments, SCRIPT, folder, **environment)


@pytest.mark.slow
def test_two_processes_on_the_cpu(tmp_path: Path) -> None:
    config = engine.CONFIGS / "cpu_2_processes.yaml"
    result = launch(tmp_path, "--config_file", config, BITFIT_ENGINE="cpu_2_processes", ACCELERATE_USE_CPU="1")
    assert result.returncode == 0, result.stderr[-4000:]
    assert (tmp_path / "engine.txt").read_text() == "DDP on 2 processes, cpu"


@pytest.mark.slow
def test_what_quietly_runs_as_something_else_is_an_error(tmp_path: Path) -> None:
    result = launch(tmp_path, "--cpu", "--num_processes", 2)
    assert result.returncode != 0
    assert "asked for several processes and started one" in result.stderr

    values = yaml.safe_load((engine.CONFIGS / "fsdp2.yaml").read_text()) | {"use_cpu": True}
    config = tmp_path / "fsdp_on_cpu.yaml"
    config.write_text(yaml.safe_dump(values))
    result = launch(tmp_path, "--config_file", config, ACCELERATE_USE_CPU="1")
    assert result.returncode != 0
    assert "This run is DDP on 2 processes, cpu, but `accelerate launch`" in result.stderr
    assert "was asked for FSDP2 on 2 processes" in result.stderr
    assert not (tmp_path / "engine.txt").exists()
