"""[`PrivateTrainer`]: a Trainer that draws Poisson batches and takes per-example gradients."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from ...errors import PrivacyError, TrainerSetupError
from ...training_run import TrainingRun
from ...tuner.per_example import PerExample
from ..callback import BitFitCallback
from ..checks import adapter_configs
from ..parameter_groups import trainable_deltas, trainable_head
from .checks import check_private_setup
from .config import PrivacyConfig, require_opacus
from .gradients import PrivateSum
from .ledger import Ledger
from .sampling import EMPTY, CollateOrEmpty, PoissonBatches
from .study import Studied, batch_of, check_padding, study_batch

logger = logging.getLogger(__name__)


class PrivateTrainer(Trainer):
    """
    A `Trainer` whose `train` is differentially private (DP-BiTFiT, Bu et al. 2022), with the same arguments.

    Two models trained on data sets that differ by one example, added or removed, can be told apart only as far as
    (ε, δ) allow. The batch of an update is drawn by Opacus' Poisson sampler: each example takes part with probability
    `per_device_train_batch_size × gradient_accumulation_steps × processes / n`, so batches vary in size and may be
    empty. Each example's gradient, over deltas and head together, is clipped to the `max_grad_norm` of the
    [`PrivacyConfig`], the clipped ones are summed over the whole update and over all processes (DDP), noise is added
    once, and the sum is divided by the expected batch size. What follows, the optimizer and its schedule, is the stock
    Trainer's. An example's loss is the mean over its own labels, for token classification and causal LM too, also with
    `label_smoothing_factor`.

    `train_sampling_strategy="group_by_length"` has its own meaning here: the batch of an update is drawn as ever, and
    its parts for gradient accumulation hold examples of like length.

    Not covered: evaluation data and what is chosen by it, and what this process writes for you alone, such as the
    training loss in the log and `trainer_state.json`, and the key of the noise in checkpoints.

    Args:
        args, kwargs: As for [`~transformers.Trainer`]; a `BitFitCallback(privacy=PrivacyConfig(...))` is among the
            `callbacks`.

    Raises:
        [`TrainerSetupError`]: There is no such callback.
        [`PrivacyError`]: The guarantee would not hold.
    """

    trains_privately = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_opacus()
        super().__init__(*args, **kwargs)
        found = [c for c in self.callback_handler.callbacks if isinstance(c, BitFitCallback) and c.privacy is not None]
        if len(found) != 1:
            raise TrainerSetupError(
                f"PrivateTrainer needs one BitFitCallback(privacy=PrivacyConfig(...)) among its `callbacks`, got "
                f"{len(found)}."
            )
        self._bitfit = found[0]
        self._privacy: PrivacyConfig = found[0].privacy  # type: ignore[assignment]
        self._ledger: Ledger | None = None
        self._sum: PrivateSum | None = None
        self._studied: Studied | None = None
        self._collate: CollateOrEmpty | None = None
        self._left_at: str | None = None  # digest of what this Trainer's training has left
        self._resumed_from: Path | None = None
        self.model_accepts_loss_kwargs = False  # else losses are divided by the labels of the whole update
        if self.args.max_grad_norm:
            logger.info(
                "The Trainer's max_grad_norm=%g is switched off: private training clips each example's gradient, to "
                "%g, and not their noised sum.",
                self.args.max_grad_norm,
                self._privacy.max_grad_norm,
            )
            self.args.max_grad_norm = 0.0
        check_private_setup(self, recompute=self._bitfit.recompute_activations)
        run = getattr(adapter_configs(self.model)[self._bitfit.adapter_name], "run", None)  # type: ignore[arg-type]
        self._spent_before: dict[str, Any] | None = getattr(run, "privacy", None)
        self.add_callback(_BeforeTheFirstStep(self))

    @property
    def ledger(self) -> Ledger:
        """What has been spent on this Trainer's model so far."""
        if self._ledger is None:
            expected = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            self._ledger = Ledger(self._privacy, len(self.train_dataset), expected)  # type: ignore[arg-type]
        return self._ledger

    # --- batches ---

    def get_train_dataloader(self) -> DataLoader:
        """Poisson batches of this process; accelerate is left out, whose loaders know batches of one size only."""
        ledger, args = self.ledger, self.args
        data: Any = self.train_dataset
        if len(data) != ledger.examples:
            raise PrivacyError(
                f"The training data has {len(data)} examples, and what was spent is of {ledger.examples}: another "
                "sampling rate and another δ. Make a new Trainer, on a model from the base."
            )
        collate: Any = self.data_collator
        if hasattr(data, "column_names"):
            data = self._remove_unused_columns(data, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        self._collate = CollateOrEmpty(collate, _name(self.data_collator))
        batches = PoissonBatches(
            ledger.sample_rate,
            args.gradient_accumulation_steps,
            ledger.draw,
            process=args.process_index,
            processes=args.world_size,
            lengths=_lengths(data, args.length_column_name) if _by_length(args) else None,
        )
        return DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=self._collate,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )

    # --- training ---

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        resume = kwargs.get("resume_from_checkpoint")
        self._resumed_from = Path(resume) if resume else None
        skip, self.args.ignore_data_skip = self.args.ignore_data_skip, True  # the ledger's key does that
        try:
            result = super()._inner_training_loop(*args, **kwargs)
        finally:
            self.args.ignore_data_skip = skip
            self._left_at = self._digest()
        self._record(final=True)
        return result

    def begin_private(self, step: int, last_step: int) -> None:
        """Settles noise and budget, and starts to keep gradients apart.

        Args:
            step (`int`), last_step (`int`): Updates that the run has behind it, and at its end.
        """
        model: Any = self.model
        check_private_setup(self, recompute=self._bitfit.recompute_activations)
        decayed, plain = trainable_head(model)
        deltas = trainable_deltas(model)
        parameters = list({id(p): p for p in (deltas | decayed | plain).values()}.values())
        self._sum = PrivateSum(parameters, self._privacy.max_grad_norm)
        self._studied = None
        if self._resumed_from is not None:
            self.ledger.load(self._resumed_from, step)
        else:
            self._check_start(model, untrained=not any(bool(delta.any()) for delta in deltas.values()))
        self.ledger.share_key()
        self.ledger.state = lambda: (self._digest() or "").encode()
        self.ledger.plan(last_step - step)
        # Whoever saves before the end says more than is spent, never less.
        self._run.privacy = self.ledger.facts(ahead=last_step - step)
        ledger = self.ledger
        logger.info(
            "Private training: noise multiplier %.4g, clip %g, sampling rate %.4g, %d updates, delta %.3g, accountant "
            "%s, for adding or removing one example of %d.",
            ledger.noise_multiplier,
            self._privacy.max_grad_norm,
            ledger.sample_rate,
            last_step - step,
            ledger.delta,
            self._privacy.accountant,
            ledger.examples,
        )

    def _check_start(self, model: nn.Module, *, untrained: bool) -> None:
        """Refuses an adapter with a past that the ledger does not know."""
        name = self._bitfit.adapter_name
        if self._spent_before:
            self._run.privacy = dict(self._spent_before)  # of the run that has just begun, which must not hide it
            spent = self._spent_before.get("epsilon")
            raise PrivacyError(
                f"The adapter {name!r} comes from private training already "
                f"({'without noise' if spent is None else f'ε = {spent:.4g}'}), and an ε that starts at zero again "
                "would leave that out. Go on with the Trainer that trained it, or with `resume_from_checkpoint`; or "
                "start from the base."
            )
        if untrained or self._privacy.public_start or self._left_at == self._digest():
            return
        raise PrivacyError(
            f"The adapter {name!r} has been trained before, not by this Trainer, and an ε that counts this run alone "
            "would leave out what it learned of private data then. Start from the base; or, where it has seen none, "
            "say so with `PrivacyConfig(public_start=True)`."
        )

    @property
    def _run(self) -> TrainingRun:
        run = adapter_configs(self.model)[self._bitfit.adapter_name].run  # type: ignore[arg-type]
        assert run is not None  # the callback has begun one
        return run

    def _digest(self) -> str | None:
        if self._sum is None:
            return None
        digest = hashlib.sha256()
        for parameter in self._sum.parameters:
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def begin_update(self) -> None:
        """Forgets what an update has left that was broken off between its parts."""
        assert self._sum is not None
        self._sum.clear()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Adds the clipped gradients of a batch; behind the last one of an update, adds noise once."""
        assert self._sum is not None
        model.train()
        loss = torch.zeros((), device=self.args.device)
        if EMPTY not in inputs:
            loss = self._add_batch(self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
        if self.accelerator.sync_gradients:
            ledger = self.ledger
            assert ledger.noise_multiplier is not None
            ledger.spend()  # before the noise: a run that is broken off here has counted too much, never too little
            several = self.args.world_size > 1
            self._sum.release(
                ledger.noise_multiplier,
                ledger.noise if self.args.process_index == 0 else None,
                ledger.expected_batch_size,
                reduce=(lambda total: self.accelerator.reduce(total, "sum")) if several else None,
                broadcast=broadcast if several else None,
            )
        return loss

    def _add_batch(self, inputs: dict[str, Any]) -> torch.Tensor:
        # The model without DDP's wrapper: that waits for every parameter's gradient in every process, and sums what
        # is not clipped. Here no parameter gets one, and a process may have no example.
        model: Any = self.model
        assert self._sum is not None
        batch = batch_of(inputs)
        studied = self._studied or self._study(inputs, batch)
        scale = studied.scale(inputs["labels"])
        if not bool((scale > 0).any()):
            return torch.zeros((), device=scale.device)  # no label at all: the loss is 0 / 0
        with PerExample(model, batch, studied.rows) as tape:
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, dict(inputs))
            loss.backward()
        self._sum.add(tape.gradients, scale)
        return loss.detach()

    def _study(self, inputs: dict[str, Any], batch: int) -> Studied:
        model: Any = self.model
        low = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters())
        tolerance = 5e-2 if low or self.accelerator.mixed_precision != "no" else 2e-3

        def loss_of(part: dict[str, Any]) -> torch.Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, dict(part))  # type: ignore[return-value]

        studied = study_batch(model, inputs, loss_of, tolerance=tolerance)
        if batch > 1:  # one example alone says little of whether they mix
            self._studied = studied
            if self._collate is not None and self._collate.alone is not None:
                index, alone = self._collate.alone
                check_padding(model, inputs, index, self._prepare_inputs(alone), loss_of, tolerance=tolerance)
        return studied

    # --- what is recorded ---

    def _record(self, *, final: bool = False) -> None:
        run = self._run
        run.privacy = self.ledger.facts()
        # Computed from the training data without noise; the time tells of the lengths of the examples.
        run.train_loss = run.seconds = None
        run.hyperparameters.pop("max_grad_norm", None)
        if final and self.is_world_process_zero():
            epsilon = run.privacy.get("epsilon")
            logger.info(
                "Private training spent %s: %s.",
                "no stated ε, since no noise was added" if epsilon is None else f"ε = {epsilon:.4g}",
                ", ".join(f"{name} {value}" for name, value in run.privacy.items() if name != "epsilon"),
            )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        planned = self._run.privacy
        self._record()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=kwargs.get("trial", args[1] if len(args) > 1 else None)))
            folder = folder / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self.ledger.save(folder)
        super()._save_checkpoint(*args, **kwargs)
        self._run.privacy = planned


def _name(collator: Any) -> str:
    return getattr(collator, "__name__", type(collator).__name__)


def _by_length(args: Any) -> bool:
    return str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)) == "group_by_length"


def _lengths(data: Any, column: str | None) -> Sequence[int]:
    """How long each example is, as the Trainer's own grouping finds it."""
    names = getattr(data, "column_names", None) or ()
    if column is not None and column in names:
        return list(data[column])
    if "input_ids" in names:
        return [len(ids) for ids in data["input_ids"]]
    first = data[0]
    if not hasattr(first, "__getitem__") or "input_ids" not in first:
        raise PrivacyError(
            '`train_sampling_strategy="group_by_length"` needs examples with `input_ids`, or a column of lengths that '
            "`length_column_name` names."
        )
    return [len(data[index]["input_ids"]) for index in range(len(data))]


class _BeforeTheFirstStep(TrainerCallback):
    def __init__(self, trainer: PrivateTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_private(state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_update()
