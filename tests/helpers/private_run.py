"""One process of the private runs that `test_private_distributed.py` launches; writes down what this one has.

torchrun --nproc_per_node 2 tests/helpers/private_run.py FOLDER BATCH_SIZE
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from safetensors.torch import save_file
from trainer_tester import arguments, fresh, rows, tuned

from bitfit_hf import BitFitCallback, PrivacyConfig, PrivateTrainer
from bitfit_hf.trainer.private.gradients import generator_noise, secure_noise
from bitfit_hf.trainer.private.ledger import Ledger
from bitfit_hf.trainer.private.sampling import EMPTY, keyed_generator

# By case: what is asked for, and arguments of the Trainer. Of 24 examples 4 are in an update on average.
CASES: dict[str, tuple[PrivacyConfig, dict[str, Any]]] = {
    "plain": (PrivacyConfig(accountant="rdp", noise_multiplier=0.0, max_grad_norm=math.inf), {"optim": "sgd"}),
    "clipped": (
        PrivacyConfig(accountant="rdp", noise_multiplier=0.0, max_grad_norm=0.05),
        {"gradient_accumulation_steps": 2},
    ),
    "noised": (
        PrivacyConfig(accountant="rdp", noise_multiplier=1.0, max_grad_norm=0.5),
        {"save_steps": 3, "save_total_limit": None},
    ),
    "words": (PrivacyConfig(accountant="rdp", noise_multiplier=0.5, max_grad_norm=0.5), {}),
    "secure": (PrivacyConfig(accountant="rdp", noise_multiplier=1.0, max_grad_norm=0.5, secure_mode=True), {}),
}


class Watched(PrivateTrainer):
    """Notes how many examples each of this process's batches has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: list[int] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.sizes.append(0 if EMPTY in inputs else len(inputs["labels"]))
        return super().training_step(model, inputs, *args, **kwargs)


def trainer_of(case: str, folder: Path, batch_size: int) -> Watched:
    """A Trainer whose batches and noise are those of the same case in another number of processes."""
    privacy, values = CASES[case]
    name = "bert-token" if case == "words" else "bert-sequence"
    batch = batch_size // values.get("gradient_accumulation_steps", 1)
    values = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 8, **values}
    trainer = Watched(
        fresh(name),
        arguments(folder / case, per_device_train_batch_size=batch, **values),
        train_dataset=rows(24, name),
        callbacks=[BitFitCallback(privacy=privacy)],
    )
    if trainer.args.process_index == 0:
        trainer.ledger._key = b"of the first process, which the others are given"
    return trainer


def noise_of(ledger: Ledger) -> Any:
    """The same whatever the last digits of the sum, which several processes add up in another order."""
    if ledger.config.secure_mode:
        return secure_noise
    return generator_noise(keyed_generator(ledger._key, str(ledger.steps).encode()))


def main(folder: Path, batch_size: int) -> None:
    Ledger.noise = property(noise_of)
    begin = PrivateTrainer.begin_private

    def begin_alike(trainer: Any, *args: Any) -> None:
        begin(trainer, *args)
        trainer.ledger.state = bytes  # batches too

    PrivateTrainer.begin_private = begin_alike
    for case in CASES:
        for resumed in (False, True) if case == "noised" else (False,):
            trainer = trainer_of(case, folder, batch_size)
            trainer.train(resume_from_checkpoint=str(folder / case / "checkpoint-3") if resumed else None)
            name = f"{case}{'-resumed' if resumed else ''}-{trainer.args.process_index}"
            model: Any = trainer.model
            facts = {
                "processes": trainer.args.world_size,
                "wrapped by": type(trainer.model_wrapped).__name__,
                "sizes": trainer.sizes,
                "privacy": model.peft_config["default"].run.privacy,
            }
            save_file({key: value.contiguous() for key, value in tuned(model).items()}, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
