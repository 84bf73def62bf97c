"""What would break the guarantee of private training: refused before the first step, each with one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import PrivacyError, TrainerSetupError, collect
from ...training_run import TrainingRun
from ...tuner.per_example import unsupported_parts
from ..checks import sharding_engine

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


LEDGER_FILE = "privacy.json"


def require_private_trainer(trainer: Any) -> None:
    """Refuses a callback with `privacy=` in any Trainer but [`PrivateTrainer`].

    Raises:
        [`TrainerSetupError`]: It is in another one.
    """
    if not getattr(trainer, "trains_privately", False):
        raise TrainerSetupError(
            "BitFitCallback(privacy=…) needs `bitfit_hf.PrivateTrainer` in place of the Trainer: a stock one cuts the "
            "data into batches of one size, and no ε can be stated for those. Its arguments are the same."
        )


def refuse_private_past(
    run: TrainingRun | None, adapter_name: str, checkpoint: str | os.PathLike[str] | None = None
) -> None:
    """Refuses to train on without privacy what has been trained with it: the ε that it carries would not be true.

    Args:
        run ([`TrainingRun`], *optional*): What the adapter's config says of its training.
        adapter_name (`str`): The adapter.
        checkpoint (`str` or `os.PathLike`, *optional*): That is about to be resumed from.

    Raises:
        [`PrivacyError`]: It was trained privately.
    """
    what = f"The adapter {adapter_name!r}"
    if checkpoint is not None:
        if not Path(checkpoint, LEDGER_FILE).exists():
            return
        what = f"The checkpoint {checkpoint}"
    elif run is None or not run.privacy:
        return
    raise PrivacyError(
        f"{what} comes from private training, and this Trainer would go on without privacy, so that what was promised "
        "of it no longer held. Go on with the PrivateTrainer that trained it, or resume its checkpoint in one; or "
        "train a new adapter. To give the guarantee up on purpose, take what the adapter says of it away first: "
        f"`model.peft_config[{adapter_name!r}].run = None`."
    )


def check_private_setup(trainer: Trainer, *, recompute: bool) -> None:
    """Refuses arguments, data and models with which the guarantee would not hold.

    Raises:
        [`PrivacyError`]: With all that was found.
    """
    model, data = trainer.model, trainer.train_dataset
    assert model is not None
    problems = [*_engine(trainer), *_arguments(trainer.args, recompute)]
    if trainer.compute_loss_func is not None:
        problems.append("`compute_loss_func`: it is not known how such a loss divides by the batch")
    if data is not None and not isinstance(data, Sized):
        problems.append("a training set without a length: the sampling rate needs one")
    problems += [
        f"{path} ({type(module).__name__}): a batch norm mixes the examples of a batch"
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    problems += unsupported_parts(model)
    if problems:
        raise PrivacyError(f"This cannot be trained privately:{collect(problems)}")


def _engine(trainer: Trainer) -> Iterator[str]:
    kind = trainer.accelerator.distributed_type.value
    if sharding_engine(trainer.args) is not None or not (kind == "NO" or kind.startswith("MULTI_")):
        yield f"{kind}: an example's gradient is clipped as a whole, in one process; use DDP or one process"
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        yield "`parallelism_config`: an example's gradient is clipped as a whole, in one process"


def _arguments(args: TrainingArguments, recompute: bool) -> Iterator[str]:
    if args.fp16:
        yield "`fp16`: its loss scaling skips updates, which tells of the data; use `bf16`"
    if args.torch_compile:
        yield "`torch_compile`: per-example gradients are taken by code that it cannot trace"
    if args.auto_find_batch_size:
        yield "`auto_find_batch_size`: the sampling rate would change while the run is accounted"
    if args.dataloader_num_workers:
        yield "`dataloader_num_workers`: workers draw batches ahead, which a checkpoint could not resume"
    if str(args.include_num_input_tokens_seen) not in ("no", "False"):
        yield "`include_num_input_tokens_seen`: it publishes how long the training examples are"
    if recompute:
        yield "`recompute_activations`: use `gradient_checkpointing` with private training"
