"""[`PrivateTrainer`]: a Trainer that draws Poisson batches and takes per-example gradients."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from ...errors import PrivacyError, TrainerSetupError
from ...terms.structure import stock_root
from ...tuner.per_example import PerExample
from ..callback import BitFitCallback
from ..checks import adapter_configs
from ..parameter_groups import trainable_deltas, trainable_head
from .checks import batch_of, check_private_setup, study_batch, token_counts
from .config import PrivacyConfig, require_opacus
from .gradients import PrivateSum
from .ledger import Ledger
from .sampling import EMPTY, CollateOrEmpty, PoissonBatches

logger = logging.getLogger(__name__)


class PrivateTrainer(Trainer):
    """
    A `Trainer` whose `train` is differentially private (DP-BiTFiT, Bu et al. 2022), with the same arguments.

    Two models trained on data sets that differ by one example, added or removed, can be told apart only as far as
    (ε, δ) allow. The batch of an update is drawn by Opacus' Poisson sampler: each example takes part with probability
    `per_device_train_batch_size × gradient_accumulation_steps / n`, so batches vary in size and may be empty. Each
    example's gradient, over deltas and head together, is clipped to `max_grad_norm`, the clipped ones are summed over
    the whole update, noise is added once, and the sum is divided by the expected batch size. What follows, the
    optimizer and its schedule, is the stock Trainer's. An example's loss is the mean over its own labels, for token
    classification and causal LM too.

    Not covered: evaluation data and what is chosen by it, and what this process writes for you alone, such as the
    training loss in the log and `trainer_state.json`, and the generators' states in checkpoints.

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
        self._rows: dict[nn.Module, tuple[int, bool]] | None = None
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
            expected = self.args.train_batch_size * self.args.gradient_accumulation_steps
            self._ledger = Ledger(self._privacy, len(self.train_dataset), expected)  # type: ignore[arg-type]
        return self._ledger

    # --- batches ---

    def get_train_dataloader(self) -> DataLoader:
        """Poisson batches; accelerate is left out, whose loaders know batches of one size only."""
        ledger = self.ledger
        data: Any = self.train_dataset
        collate: Any = self.data_collator
        if hasattr(data, "column_names"):
            data = self._remove_unused_columns(data, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        return DataLoader(
            data,
            batch_sampler=PoissonBatches(
                ledger.examples, ledger.sample_rate, self.args.gradient_accumulation_steps, ledger.batch_generator
            ),
            collate_fn=CollateOrEmpty(collate),
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    # --- training ---

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        resume = kwargs.get("resume_from_checkpoint")
        self._resumed_from = Path(resume) if resume else None
        skip, self.args.ignore_data_skip = self.args.ignore_data_skip, True  # the generators' states do that
        try:
            result = super()._inner_training_loop(*args, **kwargs)
        finally:
            self.args.ignore_data_skip = skip
        self._record(final=True)
        return result

    def begin_private(self, step: int, last_step: int) -> None:
        """Settles noise and budget, and starts to keep gradients apart.

        Args:
            step (`int`), last_step (`int`): Updates that the run has behind it, and at its end.
        """
        model: Any = self.model
        check_private_setup(self, recompute=self._bitfit.recompute_activations)
        if self._resumed_from is not None:
            self.ledger.load(self._resumed_from, step)
        elif self._spent_before:
            run = adapter_configs(model)[self._bitfit.adapter_name].run
            assert run is not None  # the callback has just begun one, which must not hide what was spent
            run.privacy = dict(self._spent_before)
            spent = self._spent_before.get("epsilon")
            raise PrivacyError(
                f"The adapter {self._bitfit.adapter_name!r} comes from private training already "
                f"({'without noise' if spent is None else f'ε = {spent:.4g}'}), and an ε that starts at zero again "
                "would leave that out. Go on with the Trainer that trained it, or with `resume_from_checkpoint`; or "
                "start from the base."
            )
        self.ledger.plan(last_step - step)
        decayed, plain = trainable_head(model)
        parameters = list({id(p): p for p in (trainable_deltas(model) | decayed | plain).values()}.values())
        self._sum = PrivateSum(parameters, self._privacy.max_grad_norm)
        self._rows = None
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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Adds the clipped gradients of a batch; behind the last one of an update, adds noise once."""
        assert self._sum is not None
        model.train()
        loss = torch.zeros((), device=self.args.device)
        if EMPTY not in inputs:
            loss = self._add_batch(model, self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
        if self.accelerator.sync_gradients:
            ledger = self.ledger
            assert ledger.noise_multiplier is not None
            ledger.spend()  # before the noise: a run that is broken off here has counted too much, never too little
            self._sum.release(ledger.noise_multiplier, ledger.noise, ledger.expected_batch_size)
        return loss

    def _add_batch(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        assert self._sum is not None
        batch = batch_of(inputs)
        root = stock_root(model)
        counts = token_counts(root, inputs["labels"])
        if not bool(counts.sum() > 0):
            return torch.zeros((), device=counts.device)  # no label at all: the loss is 0 / 0
        if self._rows is None:
            rows = study_batch(model, root, inputs)
            self._rows = rows if batch > 1 else None  # one example alone says little of whether they mix
        else:
            rows = self._rows
        with PerExample(model, batch, rows) as tape:
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, inputs)
            loss.backward()
        # A mean over the batch's labels divides each example by what depends on the others: undo that, and divide by
        # the example's own labels.
        scale = torch.where(counts > 0, counts.sum() / counts.clamp(min=1), torch.zeros_like(counts))
        self._sum.add(tape.gradients, scale)
        return loss.detach()

    # --- what is recorded ---

    def _record(self, *, final: bool = False) -> None:
        model: Any = self.model
        run = getattr(adapter_configs(model)[self._bitfit.adapter_name], "run", None)
        if run is None:
            return
        run.privacy = self.ledger.facts()
        run.train_loss = None  # computed from the training data without noise
        run.hyperparameters.pop("max_grad_norm", None)
        if final:
            epsilon = run.privacy.get("epsilon")
            logger.info(
                "Private training spent %s: %s.",
                "no stated ε, since no noise was added" if epsilon is None else f"ε = {epsilon:.4g}",
                ", ".join(f"{name} {value}" for name, value in run.privacy.items() if name != "epsilon"),
            )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._record()
        folder = Path(self._get_output_dir(trial=kwargs.get("trial", args[1] if len(args) > 1 else None)))
        folder = folder / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        self.ledger.save(folder)
        super()._save_checkpoint(*args, **kwargs)


class _BeforeTheFirstStep(TrainerCallback):
    def __init__(self, trainer: PrivateTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.begin_private(state.global_step, state.max_steps)
