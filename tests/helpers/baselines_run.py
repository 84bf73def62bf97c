"""One process of the run that `test_baselines.py` launches: trains each method and writes down what this rank has.

torchrun --nproc_per_node 2 tests/baselines_run.py FOLDER BATCH_SIZE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import torch
from distributed_run import loss
from reproduction.baselines import METHODS, make_method
from reproduction.baselines.diff_pruning import gates
from safetensors.torch import save_file
from trainer_tester import arguments, fresh, in_order, rows, stock_trainer

OPTIONS = {"adapter": {"bottleneck": 4}, "diff_pruning": {"sparsity": 0.03}, "lora": {"dropout": 0.0}}


def main(folder: Path, batch_size: int) -> None:
    for name in METHODS:
        method = make_method(name, **OPTIONS.get(name, {}))
        model = method.prepare(fresh())
        # Plain gradient descent: Adam turns the rounding noise in a key bias's gradient into steps.
        args = arguments(folder / name, per_device_train_batch_size=batch_size, max_steps=6, optim="sgd", **in_order())
        kwargs = {"callbacks": method.callbacks(), "compute_loss_func": loss, **method.trainer_kwargs(model, args)}
        trainer = stock_trainer(model, args, train=rows(48), **kwargs)
        trainer.train()
        facts = {
            "processes": args.world_size,
            "wrapped by": type(trainer.model_wrapped).__name__,
            "body": method.trainable(model).body,
            "kept": sum(int(gate.mask.sum()) for _, _, gate in gates(model)),
        }
        trained = {key: tensor.detach().clone() for key, tensor in model.named_parameters() if tensor.requires_grad}
        save_file(trained, folder / f"{name}-{args.process_index}.safetensors")
        (folder / f"{name}-{args.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
