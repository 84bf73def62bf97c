"""Is a run what `accelerate launch` was asked for? Which engine, on how many processes.

The answer cannot be taken for granted. With `use_cpu: true` an FSDP config becomes plain DDP; `--cpu` with
`--num_processes 2`, and `distributed_type: MULTI_CPU`, start one process; a DDP config on a machine without a GPU can
start two that know nothing of each other and overwrite each other's files. None of this is an error, and each would
put the name of one engine over the figures of another. So a recipe calls [`check_engine`] once its Trainer is made.

What was asked for is read from what the launcher leaves in the environment of each process. The variable
`BITFIT_ENGINE` says it in so many words; it names a file of recipes/accelerate/, with or without `.yaml`:

    BITFIT_ENGINE=fsdp2 accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/glue.py ...
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import str_to_bool
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate"
VARIABLE = "BITFIT_ENGINE"

SINGLE, DDP = "one process", "DDP"
GPU = "GPU"  # of whatever kind


class EngineError(RuntimeError):
    """A run is not what was asked for."""


@dataclass(frozen=True)
class Engine:
    """
    How a model is trained.

    Args:
        name (`str`): `"one process"`, `"DDP"`, `"FSDP1"`, `"FSDP2"`, `"DeepSpeed ZeRO-2"`, `"DeepSpeed ZeRO-3"`, ….
        processes (`int`): How many take part.
        device (`str`, *optional*): Kind of device: `"cpu"`, `"cuda"`, …; in what was asked for, [`GPU`] of
            any kind, or `None` where nothing was said.
    """

    name: str
    processes: int
    device: str | None = None

    def __str__(self) -> str:
        many = "" if self.name == SINGLE else f" on {self.processes} process{'es' * (self.processes != 1)}"
        return f"{self.name}{many}" + (f", {self.device}" if self.device else "")


def asked_of_launcher(environment: Mapping[str, str]) -> Engine | None:
    """
    What a launcher was asked for, as far as the environment of the process tells; `None` where there was no launcher.

    Args:
        environment (`Mapping[str, str]`): `os.environ` of the process.
    """

    def on(name: str) -> bool:
        return bool(str_to_bool(environment.get(name, "false") or "false"))

    processes = int(environment.get("WORLD_SIZE", "1"))
    if on("ACCELERATE_USE_FSDP"):
        return Engine(f"FSDP{environment.get('FSDP_VERSION', '1')}", processes)
    if on("ACCELERATE_USE_DEEPSPEED"):
        return Engine(f"DeepSpeed ZeRO-{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '?')}", processes)
    if "WORLD_SIZE" in environment:
        return Engine(DDP if processes > 1 else SINGLE, processes)
    return None


def asked_of_config(name: str, processes: int | None = None) -> Engine:
    """
    What a config of `accelerate launch` asks for.

    Args:
        name (`str`): A file of recipes/accelerate/, with or without `.yaml`, or the path of another one.
        processes (`int`, *optional*): How many the launcher really was told to start; `--num_processes` wins over the
            file.

    Raises:
        [`EngineError`]: There is no such config.
    """
    given = Path(name)
    path = next((p for p in (given, CONFIGS / given.name, CONFIGS / f"{given.name}.yaml") if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise EngineError(f"{VARIABLE}={name}: there is no such config. Name one of {known}, or a file.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    kind = values["distributed_type"]
    wanted = int(values.get("num_processes", 1))
    if kind == "FSDP":
        engine = f"FSDP{values.get('fsdp_config', {}).get('fsdp_version', 1)}"
    elif kind == "DEEPSPEED":
        engine = f"DeepSpeed ZeRO-{values.get('deepspeed_config', {}).get('zero_stage', 2)}"
    else:
        engine = DDP if (wanted if processes is None else processes) > 1 else SINGLE
    return Engine(engine, wanted if processes is None else processes, "cpu" if values.get("use_cpu") else GPU)


def running(trainer: Trainer) -> Engine:
    """
    What runs. The processes are counted by their taking part in a sum, not by what one of them says.

    Args:
        trainer ([`~transformers.Trainer`]): Just made, or training.
    """
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    if kind == "FSDP":
        name = f"FSDP{getattr(accelerator.state.fsdp_plugin, 'fsdp_version', 1)}"
    elif kind == "DEEPSPEED":
        name = f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    else:
        name = SINGLE if kind == "NO" else DDP
    one = torch.ones((), device=accelerator.device)
    processes = int(accelerator.reduce(one, "sum").item()) if kind != "NO" else 1
    return Engine(name, processes, accelerator.device.type)


def check_engine(trainer: Trainer, environment: Mapping[str, str] | None = None) -> Engine:
    """
    Stops a run that is not what was asked for: at once where that can be seen at once, and before the first step where
    it takes a look at how the model was wrapped.

    Args:
        trainer ([`~transformers.Trainer`]): Just made.
        environment (`Mapping[str, str]`, *optional*): Instead of `os.environ`.

    Returns:
        [`Engine`]: What runs; worth a place in the record of the run.

    Raises:
        [`EngineError`]: It is another engine, or another number of processes.
    """
    environment = os.environ if environment is None else environment
    found = running(trainer)
    launched = asked_of_launcher(environment)
    problems = []
    if launched is not None and (launched.name, launched.processes) != (found.name, found.processes):
        problems.append(f"`accelerate launch` (or torchrun) was asked for {launched}")
    if launched is None and "MASTER_ADDR" in environment and found.processes == 1:
        # All that accelerate leaves behind when it starts one process where several were asked for.
        problems.append("`accelerate launch` was asked for several processes and started one")
    if environment.get(VARIABLE):
        asked = asked_of_config(environment[VARIABLE], processes=launched.processes if launched is not None else None)
        device = "cpu" if found.device == "cpu" else GPU
        if asked != Engine(found.name, found.processes, device):
            problems.append(f"{VARIABLE}={environment[VARIABLE]} asks for {asked}")
    if problems:
        raise EngineError(f"This run is {found}, but {', and '.join(problems)}. {_remedy(found, environment)}")
    trainer.add_callback(_WrapperCheck(trainer, found))
    return found


def _remedy(found: Engine, environment: Mapping[str, str]) -> str:
    if found.device == "cpu" and any(
        name in environment for name in ("FSDP_VERSION", "ACCELERATE_DEEPSPEED_ZERO_STAGE")
    ):
        return "accelerate shards a model on GPUs only; on the CPU take recipes/accelerate/cpu_2_processes.yaml."
    return (
        "Several processes on the CPU come with recipes/accelerate/cpu_2_processes.yaml, and ACCELERATE_USE_CPU=1 in "
        "the environment where the script does not choose the CPU itself; one per GPU with ddp.yaml."
    )


class _WrapperCheck(TrainerCallback):
    """Looks at the wrapped model, which there is only once training begins."""

    def __init__(self, trainer: Trainer, engine: Engine) -> None:
        self.trainer: Any = trainer
        self.engine = engine

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer is None:
            return
        found = wrapper(self.trainer.model_wrapped)
        self.trainer = None  # once; and a Trainer that is done can be freed
        if found != self.engine.name:
            raise EngineError(
                f"Training was to run as {self.engine}, but the model is wrapped for {found}: something between the "
                "launcher and the Trainer has changed the engine."
            )


def wrapper(model: nn.Module) -> str:
    """The engine that a model is wrapped for, by the name that [`Engine`] has for it."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel):
        return DDP
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return "FSDP2"
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "FSDP1"
    if type(model).__name__ == "DeepSpeedEngine":
        return f"DeepSpeed ZeRO-{model.zero_optimization_stage()}"  # type: ignore[operator]
    return SINGLE
