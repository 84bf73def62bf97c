"""One process of the run that `test_distributed.py` launches: trains each case and writes down what this rank has.

torchrun --nproc_per_node 2 tests/distributed_run.py FOLDER BATCH_SIZE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from safetensors.torch import save_file
from trainer_tester import IN_PLACE, WAYS, arguments, in_order, losses, prepared, rows, trainer_for, tuned

import bitfit_hf.trainer.callback
from bitfit_hf import BitFitCallback


def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """The mean over the batches of all processes, which a classifier's own loss does not take."""
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def main(folder: Path, batch_size: int) -> None:
    written: list[str] = []
    write = bitfit_hf.trainer.callback.write_checkpoint

    def count(model: Any, adapter_name: str, checkpoint: Path) -> None:
        written.append(checkpoint.name)
        write(model, adapter_name, checkpoint)

    bitfit_hf.trainer.callback.write_checkpoint = count
    for way in WAYS:
        for resumed in (False, True):
            written.clear()
            model = prepared(way, dropout=0.0)
            args = arguments(
                folder / way, per_device_train_batch_size=batch_size, max_steps=6, save_steps=3, seed=1, **in_order()
            )
            trainer = trainer_for(
                model,
                folder / way,
                BitFitCallback(head_learning_rate=3e-3 if way == IN_PLACE else None),
                train=rows(48),
                args=args,
                options={"compute_loss_func": loss},
            )
            trainer.train(resume_from_checkpoint=str(folder / way / "checkpoint-3") if resumed else None)
            name = f"{way}-{'resumed' if resumed else 'whole'}-{args.process_index}"
            facts = {
                "processes": args.world_size,
                "wrapped by": type(trainer.model_wrapped).__name__,
                "losses": losses(trainer),
                "written": written,
            }
            save_file(
                {key: tensor.contiguous() for key, tensor in tuned(model).items()}, folder / f"{name}.safetensors"
            )
            (folder / f"{name}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
