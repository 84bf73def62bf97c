"""One process of the runs that `test_sharded.py` launches: a stock Trainer under FSDP2 or DeepSpeed, on CPU processes.

torchrun --nproc_per_node 2 tests/sharded_trainer_run.py FOLDER fsdp2

accelerate shards on GPUs only. All that keeps its code for FSDP2 and DeepSpeed from running on the CPU is that it does
not count gloo as a backend for them; the one change here is that it does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from common.engine import wrapper
from trainer_tester import WRAPPED, arguments, fresh, in_order, losses, prepared, rows, trainer_for

from bitfit_hf import BitFitCallback
from bitfit_hf.backends.sharded import is_sharded
from bitfit_hf.errors import TrainerSetupError

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
# What `accelerate launch` calls the values of a config in the environment, where it is not their own name.
RENAMED = {
    "FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "ZERO_STAGE": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "ZERO3_INIT_FLAG": "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "ZERO3_SAVE_16BIT_MODEL": "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "OFFLOAD_OPTIMIZER_DEVICE": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "OFFLOAD_PARAM_DEVICE": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "GRADIENT_ACCUMULATION_STEPS": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "GRADIENT_CLIPPING": "ACCELERATE_GRADIENT_CLIPPING",
}


def as_the_launcher_does(config: str) -> None:
    """Puts the config into the environment, and lets gloo count as a backend for its engine."""
    values = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    os.environ |= {f"ACCELERATE_USE_{values['distributed_type']}": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    engine = values.get("fsdp_config") or values["deepspeed_config"]
    os.environ |= {RENAMED.get(key.upper(), key.upper()): str(value).lower() if isinstance(value, bool) else str(value)
                   for key, value in engine.items()}  # fmt: skip
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """The mean over the batches of all processes, which a classifier's own loss does not take."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def in_slices(parameter: Any) -> bool:
    """Whether this process keeps less than the whole; ZeRO-3 leaves small parameters whole once they were needed."""
    part = getattr(parameter, "ds_tensor", None)
    return is_sharded(parameter) or (part is not None and part.numel() < parameter.ds_numel)


def main(folder: Path, config: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        as_the_launcher_does(config)
    facts: dict[str, Any] = {}
    for kind in ("whole", "resumed") if processes > 1 else ("whole",):
        args = arguments(
            folder, per_device_train_batch_size=8 // processes, max_steps=6, save_steps=3, seed=1, **in_order(),
            use_cpu=processes == 1,
        )  # fmt: skip
        trainer = trainer_for(
            prepared(WRAPPED), folder, BitFitCallback(), train=rows(48), args=args, options={"compute_loss_func": loss}
        )
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if kind == "resumed" else None)
        model: Any = trainer.model
        facts[kind] = {
            "engine": wrapper(trainer.model_wrapped),
            "sharded": all(in_slices(parameter) for parameter in model.parameters()),
            "losses": losses(trainer),
        }
        trainer.save_model(str(folder / kind))
    if processes > 1:
        try:
            trainer_for(fresh(), folder, args=arguments(folder, use_cpu=False))
        except TrainerSetupError as error:
            facts["stock"] = str(error)
    (folder / f"facts-{args.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
