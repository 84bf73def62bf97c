"""[`BitFitCallback`]: bias-only fine-tuning for an unmodified `Trainer`."""

from __future__ import annotations

import functools
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ..card.model_card import check_card_facts
from ..config import BitFitConfig
from ..errors import TrainerSetupError
from ..recompute import recompute_activations
from ..training_run import TrainingRun, training_run
from .access import around, trainer_being_made
from .checkpoints import check_resumable, saved_as_own, write_checkpoint
from .checks import (
    adapter_configs,
    check_arguments,
    check_set_up,
    computes_with,
    sharding_engine,
)
from .dropout import WithoutDropout
from .failure import FailureWatch
from .gradient_checkpointing import let_gradients_through
from .injection import prepare_model
from .parameter_groups import (
    base_rates,
    check_optimizer,
    create_optimizer,
    made_by_trainer,
    optimizer_groups,
    trainable_deltas,
)
from .private.checks import refuse_private_past, require_private_trainer
from .private.config import PrivacyConfig
from .push import check_card_place, prepare_push
from .rates import LrScale, describe_scale, term_scale
from .start import tell_what_is_trained, warn_of_low_rate
from .term_changes import PREFIX, TermChanges

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class BitFitCallback(TrainerCallback):
    r"""
    Makes a stock `Trainer` tune the biases and the task head of a stock model, and nothing else.

    When the Trainer is made, the callback injects the deltas into its model in place, or takes a model that
    `get_peft_model` has wrapped as it is. The deltas are trained with the Trainer's learning rate and no weight decay.
    Every checkpoint is small, and what the Trainer offers (resuming, the best model at the end, accumulation, mixed
    precision, gradient checkpointing, `torch_compile`, DDP, `model_init`, `hyperparameter_search`) works as for any
    model. Whichever adapter is active, a Trainer saves and pushes its own. How far each term has moved goes to the
    Trainer's trackers with the loss, as `bias_change/<term>`.

    Args:
        config ([`BitFitConfig`], *optional*):
            What to tune; all biases by default. It is copied, so one callback serves many Trainers.
        head_learning_rate (`float`, *optional*):
            Learning rate of the head; what `lr_scale` says by default. Follows the same schedule from its own base.
            Read when the optimizer is made, so a search can set the attribute in a `model_init` that takes the trial.
        lr_scale (`str` or `Mapping[str, float]`, *optional*, defaults to `"default"`):
            Multiples of the Trainer's learning rate by bias term, see [`optimizer_groups`]; `"uniform"` is the paper's
            one rate for all terms.
        dropout (`bool`, *optional*, defaults to `False`):
            Whether the model's own dropout is in force while `train()` runs. A thousandth of the parameters hardly
            learns by heart, and dropout all over the frozen layers is noise that it has to learn through: without it
            fewer steps are enough. The model's configuration stays as it is.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the adapter. Several tasks can be trained on one base, one after the other, under several names.
        recompute_activations (`bool`, *optional*, defaults to `False`):
            Trains with less memory and a sixth to a fifth slower, with the same result: see
            [`~bitfit_hf.recompute_activations`]. In force while `train()` runs.
        privacy ([`PrivacyConfig`], *optional*):
            Trains with differential privacy, in a [`PrivateTrainer`] only.
        card (`Mapping[str, Any]`, *optional*):
            Facts for the model card that nobody but you knows: `license`, `language`, `dataset`, `dataset_config`,
            `eval_split`, and `widget`, a list of examples for the Hub's page.

    Raises:
        [`TrainerSetupError`]: The Trainer would train something else; the message says how to set it up.
        [`OptimizerError`]: Its optimizer would.

    Example:

    ```python
    from bitfit_hf import BitFitCallback, BitFitConfig
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        model,
        TrainingArguments("rte-bitfit", learning_rate=1e-3, num_train_epochs=16, per_device_train_batch_size=16),
        train_dataset=train,
        eval_dataset=validation,
        callbacks=[BitFitCallback(BitFitConfig(bias_terms="all"))],
    )
    trainer.train()
    trainer.save_model("rte-bitfit")  # a few hundred kilobytes
    ```
    """

    def __init__(
        self,
        config: BitFitConfig | None = None,
        *,
        head_learning_rate: float | None = None,
        lr_scale: LrScale = "default",
        dropout: bool = False,
        adapter_name: str = "default",
        recompute_activations: bool = False,
        privacy: PrivacyConfig | None = None,
        card: Mapping[str, Any] | None = None,
    ) -> None:
        if privacy is not None and not isinstance(privacy, PrivacyConfig):
            raise TrainerSetupError(f"`privacy` must be a PrivacyConfig, got {type(privacy).__name__}.")
        if config is not None and not isinstance(config, BitFitConfig):
            raise TrainerSetupError(f"`config` must be a BitFitConfig, got {type(config).__name__}.")
        if head_learning_rate is not None and not (
            isinstance(head_learning_rate, (int, float))
            and math.isfinite(head_learning_rate)
            and head_learning_rate > 0
        ):
            raise TrainerSetupError(f"`head_learning_rate` must be a positive number, got {head_learning_rate!r}.")
        term_scale(lr_scale)  # a wrong one is told here, not after the data has been prepared
        self.config = config
        self.lr_scale = lr_scale
        self.dropout = bool(dropout)
        self.head_learning_rate = None if head_learning_rate is None else float(head_learning_rate)
        self.adapter_name = adapter_name
        self.recompute_activations = recompute_activations
        self.privacy = privacy
        self.card = check_card_facts(card)
        self._warned: list[float] = []
        self._begin()

    def _begin(self) -> None:
        """What belongs to the models of this process."""
        self._prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._saved_to: weakref.WeakKeyDictionary[nn.Module, Path] = weakref.WeakKeyDictionary()
        self._first_step = False
        self._hooks: list[RemovableHandle | WithoutDropout] = []
        self._watch = FailureWatch()
        self._changes: TermChanges | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("_prepared", "_saved_to", "_first_step", "_hooks", "_watch", "_changes")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    # --- setting up ---

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Injects the adapter into the Trainer's model, and has a say in what the Trainer does between its events."""
        if model is None:
            raise TrainerSetupError("The Trainer has no model to tune.")
        trainer = trainer_being_made()
        if self.privacy is not None:
            require_private_trainer(trainer)
        self._prepare(model, args)
        if trainer is not None:
            self._join(trainer)

    def _join(self, trainer: Trainer) -> None:
        """Has a say in what the Trainer does without an event, or before the one that it sends."""
        around(trainer, "call_model_init", self._call_model_init)
        around(trainer, "create_optimizer", self._create_optimizer)
        around(trainer, "_load_from_checkpoint", self._load_from_checkpoint)
        around(trainer, "save_model", self._save_model)
        around(trainer, "prediction_step", self._prediction_step)
        around(trainer, "log", self._log)

    def _call_model_init(
        self, trainer: Trainer, original: Callable[..., nn.Module], *args: Any, **kwargs: Any
    ) -> nn.Module:
        model = original(*args, **kwargs)
        self._prepare(model, trainer.args)
        return model

    def _create_optimizer(self, trainer: Trainer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return create_optimizer(original, trainer, self._groups(trainer.args), *args, **kwargs)

    def _load_from_checkpoint(
        self, trainer: Trainer, original: Callable[..., None], resume_from_checkpoint: str, *args: Any, **kwargs: Any
    ) -> None:
        assert trainer.model is not None  # it is about to be trained
        check_resumable(trainer.model, self.adapter_name, resume_from_checkpoint)
        if self.privacy is None:
            refuse_private_past(None, self.adapter_name, resume_from_checkpoint)
        original(resume_from_checkpoint, *args, **kwargs)

    def _save_model(
        self, trainer: Trainer, original: Callable[..., None], output_dir: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.model is None:
            raise TrainerSetupError(
                "The Trainer has no model to save: a search for hyperparameters releases the model of each trial. Set "
                "the best run's values on `trainer.args`, and `train()` again."
            )
        folder = self._saved_to[trainer.model] = Path(output_dir or str(trainer.args.output_dir))
        if isinstance(trainer.model, PeftModel):
            check_card_place(folder)
        with saved_as_own(trainer.model, self.adapter_name):
            original(output_dir, *args, **kwargs)

    def _prediction_step(
        self, trainer: Trainer, original: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(inputs, Mapping):
            return original(model, inputs, *args, **kwargs)
        if trainer.args.torch_compile:  # a hook would have it compiled again
            result = original(model, inputs, *args, **kwargs)
            self._watch.saw(trainer.model, inputs, result[1])  # type: ignore[arg-type]  # it is being evaluated
            return result
        with self._watch.watching(trainer.model, inputs):  # type: ignore[arg-type]  # it is being evaluated
            return original(model, inputs, *args, **kwargs)

    def _log(
        self, trainer: Trainer, original: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> None:
        # The event comes too late: the trackers stand before this callback and have written by then.
        if self._changes is not None and "loss" in logs:
            logs |= self._changes.figures()
        original(logs, *args, **kwargs)

    def _prepare(self, model: nn.Module, args: TrainingArguments) -> None:
        prepare_model(model, args, self.config, self.adapter_name)
        self._prepared.add(model)

    def _groups(self, args: TrainingArguments) -> Callable[[nn.Module], list[dict[str, Any]]]:
        """Makes a model's parameter groups, with the rates that are asked for at present."""
        return functools.partial(
            optimizer_groups,
            learning_rate=args.learning_rate,
            head_learning_rate=self.head_learning_rate,
            lr_scale=self.lr_scale,
            weight_decay=args.weight_decay,
        )

    # --- training ---

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Checks, before the first step, that the deltas and the head are trained and nothing else."""
        assert model is not None  # the Trainer always passes it
        sharded = sharding_engine(args) is not None
        check_set_up(model, self.adapter_name, here=model in self._prepared or sharded)
        if self.privacy is None:
            refuse_private_past(_run_of(model, self.adapter_name), self.adapter_name)
        if optimizer is not None and not sharded:
            asked_for = self.head_learning_rate is not None or made_by_trainer(optimizer)
            check_optimizer(
                model,
                optimizer,
                groups=self._groups(args) if asked_for else None,
                resumed=state.global_step > 0,
            )
            if state.is_world_process_zero:
                rates = base_rates(trainable_deltas(model).values(), optimizer)
                warn_of_low_rate(rates, warned=self._warned)
        self._first_step = True
        self._watch.begin(model)
        self._changes = None if sharded else TermChanges(model, self.adapter_name)
        self._remove_hooks()  # of a run that was broken off
        self._hooks = [*let_gradients_through(model), *([] if self.dropout else [WithoutDropout(model)])]
        if self.recompute_activations:
            recompute_activations(model)
        if state.is_world_process_zero:
            tell_what_is_trained(model, self.adapter_name)
        run = training_run(
            args,
            train_dataloader,
            head_learning_rate=self.head_learning_rate,
            lr_scale=describe_scale(self.lr_scale, with_head=self.head_learning_rate is None),
            dropout=self.dropout,
        )
        run.card = dict(self.card)
        adapter_configs(model)[self.adapter_name].run = run

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # --- after a step ---

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Checks once, before the first update, that the loss reached the deltas."""
        if not self._first_step or model is None or sharding_engine(args) is not None:
            return
        self._first_step = False
        if all(parameter.grad is None for parameter in trainable_deltas(model).values()):
            raise TrainerSetupError(
                "The loss does not depend on any delta, so nothing would be tuned. Was `trainer.model` replaced after "
                "the Trainer was made? Make a new Trainer for another model."
            )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds to a checkpoint of an in-place model the small file that the Trainer resumes from."""
        if model is None or isinstance(model, PeftModel) or not args.should_save or sharding_engine(args) is not None:
            return
        if model in self._saved_to:  # a search for hyperparameters saves each trial in a folder of its own
            write_checkpoint(model, self.adapter_name, self._saved_to[model])

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Sees to it that the Trainer pushes the delta's files and our card, and nothing else of its folder."""
        check_arguments(args)
        if model is not None and self.adapter_name in adapter_configs(model) and state.is_world_process_zero:
            prepare_push(model, args, self.adapter_name, step=state.global_step, processing_class=processing_class)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        metrics: dict[str, float] | None = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the metrics for the model card, and sees whether the predictions are all the same."""
        if model is not None:
            self._watch.evaluated(model, tell=state.is_world_process_zero)
        run = None if model is None else _run_of(model, self.adapter_name)
        if model is None or run is None or not metrics:
            return
        if computes_with(model, self.adapter_name):
            run.add_evaluation(metrics, eval_dataloader)
        else:
            logger.warning(
                "This evaluation was not of the Trainer's adapter %r, which is not the active one, so the model card "
                "will not quote it. Call `model.set_adapter(%r)` first.",
                self.adapter_name,
                self.adapter_name,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Sees whether the loss and the deltas are finite; keeps what trackers have been told off the console."""
        for name in [name for name in logs or () if name.startswith(PREFIX)]:
            del logs[name]  # type: ignore[union-attr]
        if model is not None and logs is not None and "loss" in logs and state.is_world_process_zero:
            self._watch.logged(model, logs)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps predictions that somebody asked for apart from those of the next evaluation."""
        if model is not None:
            self._watch.forget(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the figures of the run for the model card."""
        self._remove_hooks()
        self._changes = None
        if model is not None and self.recompute_activations:
            recompute_activations(model, enabled=False)
        if model is not None and state.is_world_process_zero:
            self._watch.ended(model, steps=state.global_step)
        run = None if model is None else _run_of(model, self.adapter_name)
        if run is None:
            return
        run.ended(state, best=bool(args.load_best_model_at_end), private=self.privacy is not None)


def _run_of(model: nn.Module, adapter_name: str) -> TrainingRun | None:
    config = adapter_configs(model).get(adapter_name)
    return getattr(config, "run", None)
