"""One process of the run that `test_distributed.py` launches to count what DDP sends, and to take the best model.

torchrun --nproc_per_node 2 tests/ddp_run.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from trainer_tester import WAYS, prepared, rows, same, saved, trainer_for, tuned
from transformers import Trainer, TrainerCallback

from bitfit_hf import BitFitCallback


class Counter(TrainerCallback):
    """Adds up the bytes of the gradients that DDP hands to its communication."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.steps: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if not self.steps:
            # A function without annotations, which DDP would compare with its own.
            self.trainer.model_wrapped.register_comm_hook(None, lambda state, bucket: self.count(bucket))
        self.steps.append(0)

    def count(self, bucket: Any) -> Any:
        buffer = bucket.buffer()
        self.steps[-1] += buffer.numel() * buffer.element_size()
        return allreduce_hook(torch.distributed.group.WORLD, bucket)


def main(folder: Path) -> None:
    for way in WAYS:
        counter = Counter()
        # The rate grows too large after some steps, so that the best model is not the last one.
        schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 6, "learning_rate": 3.0}
        trainer = trainer_for(
            prepared(way),
            folder / way,
            BitFitCallback(),
            counter,
            train=rows(24),
            max_steps=6,
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            **schedule,
        )
        counter.trainer = trainer
        trainer.train()
        model: Any = trainer.model
        best = Path(str(trainer.state.best_model_checkpoint))
        facts = {
            "processes": trainer.args.world_size,
            "bytes": counter.steps,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "best": best.name,
            "is the best": same(saved(best), tuned(model)),
            "way": way,
        }
        (folder / f"bytes-{way}-{trainer.args.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
