"""[`BitFitCallback`]: bias-only fine-tuning for an unmodified `Trainer`."""

from __future__ import annotations

import copy
import functools
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..config import BitFitConfig
from ..errors import TrainerSetupError
from ..recompute import recompute_activations
from ..storage.keys import is_adapters
from ..terms import SYMBOLS, TERMS, pooler_modules
from ..terms.structure import stock_root
from ..terms.token_tensors import check_rows
from ..training_run import TrainingRun, evaluation_metrics, training_run
from ..tuner.lifecycle import begin_anew
from ..tuner.state import is_bitfit
from .access import around, trainer_being_made
from .checkpoints import accept_checkpoints, check_resumable, saved_as_own, write_checkpoint
from .checks import (
    adapter_configs,
    check_active,
    check_arguments,
    check_same_selection,
    computes_with,
    refuse_best_of_named_adapter,
    refuse_other_methods,
    refuse_sentence_model,
    refuse_sharding_in_place,
    sharding_engine,
)
from .failure import FailureWatch
from .gradient_checkpointing import let_gradients_through
from .parameter_groups import (
    base_rates,
    check_optimizer,
    create_optimizer,
    made_by_trainer,
    optimizer_groups,
    trainable_deltas,
    trainable_head,
)
from .private.checks import refuse_private_past, require_private_trainer
from .private.config import PrivacyConfig
from .push import check_base_name, check_card_place, prepare_push
from .rates import LrScale, describe_scale, term_scale

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# The paper searched the grid 1e-4, 4e-4, 7e-4, 1e-3. A rate for full fine-tuning leaves the biases where they are.
LOWEST_SENSIBLE_RATE = 1e-4


class BitFitCallback(TrainerCallback):
    r"""
    Makes a stock `Trainer` tune the biases and the task head of a stock model, and nothing else.

    When the Trainer is made, the callback injects the deltas into its model in place, or takes a model that
    `get_peft_model` has wrapped as it is. The deltas are trained with the Trainer's learning rate and no weight decay.
    Every checkpoint is small, and what the Trainer offers (resuming, the best model at the end, accumulation, mixed
    precision, gradient checkpointing, `torch_compile`, DDP, `model_init`, `hyperparameter_search`) works as for any
    model. Whichever adapter is active, a Trainer saves and pushes its own.

    Args:
        config ([`BitFitConfig`], *optional*):
            What to tune; all biases by default. It is copied, so one callback serves many Trainers.
        head_learning_rate (`float`, *optional*):
            Learning rate of the head; the Trainer's by default. Follows the same schedule from its own base. Read when
            the optimizer is made, so a search can set the attribute in a `model_init` that takes the trial.
        lr_scale (`str` or `Mapping[str, float]`, *optional*, defaults to `"default"`):
            Multiples of the Trainer's learning rate by bias term, see [`optimizer_groups`]; `"uniform"` is the paper's
            one rate for all terms.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the adapter. Several tasks can be trained on one base, one after the other, under several names.
        recompute_activations (`bool`, *optional*, defaults to `False`):
            Trains with less memory and a sixth to a fifth slower, with the same result: see
            [`~bitfit_hf.recompute_activations`]. In force while `train()` runs.
        privacy ([`PrivacyConfig`], *optional*):
            Trains with differential privacy, in a [`PrivateTrainer`] only.

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
        adapter_name: str = "default",
        recompute_activations: bool = False,
        privacy: PrivacyConfig | None = None,
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
        self.head_learning_rate = None if head_learning_rate is None else float(head_learning_rate)
        self.adapter_name = adapter_name
        self.recompute_activations = recompute_activations
        self.privacy = privacy
        self._warned: list[float] = []
        self._begin()

    def _begin(self) -> None:
        """What belongs to the models of this process."""
        self._prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._saved_to: weakref.WeakKeyDictionary[nn.Module, Path] = weakref.WeakKeyDictionary()
        self._first_step = False
        self._hooks: list[RemovableHandle] = []
        self._watch = FailureWatch()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_prepared", "_saved_to", "_first_step", "_hooks", "_watch")
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
        if trainer.args.torch_compile or not isinstance(inputs, Mapping):  # a hook would have it compiled again
            return original(model, inputs, *args, **kwargs)
        with self._watch.watching(trainer.model, inputs):  # type: ignore[arg-type]  # it is being evaluated
            return original(model, inputs, *args, **kwargs)

    def _groups(self, args: TrainingArguments) -> Callable[[nn.Module], list[dict[str, Any]]]:
        """Makes a model's parameter groups, with the rates that are asked for at present."""
        return functools.partial(
            optimizer_groups,
            learning_rate=args.learning_rate,
            head_learning_rate=self.head_learning_rate,
            lr_scale=self.lr_scale,
            weight_decay=args.weight_decay,
        )

    def _prepare(self, model: nn.Module, args: TrainingArguments) -> None:
        check_arguments(args)
        refuse_other_methods(model)
        refuse_sentence_model(model)
        refuse_sharding_in_place(model, args)
        if args.push_to_hub:
            check_base_name(model, self.adapter_name, self.config)
        refuse_best_of_named_adapter(model, args, self.adapter_name)
        if not is_bitfit(model) or self.adapter_name not in adapter_configs(model):
            self._inject(model, args)
        else:
            check_same_selection(model, self.adapter_name, self.config)
        self._activate(model)
        accept_checkpoints(model)
        self._prepared.add(model)

    def _inject(self, model: nn.Module, args: TrainingArguments) -> None:
        if isinstance(model, PeftModel):
            model.add_adapter(self.adapter_name, self._fresh_config())
            return
        if not isinstance(model, PreTrainedModel):
            raise TrainerSetupError(
                f"{type(model).__name__} is no transformers model, so the callback cannot inject adapters in place. "
                "Wrap it first: `model = get_peft_model(model, BitFitConfig(...))`."
            )
        model.add_adapter(self._fresh_config(), self.adapter_name)

    def _fresh_config(self) -> BitFitConfig:
        config = BitFitConfig() if self.config is None else copy.deepcopy(self.config)
        begin_anew(config)  # read from a delta's file it would wait for that delta's tensors
        return config

    def _activate(self, model: nn.Module) -> None:
        """Makes the adapter the active one, and trainable also if it was loaded for inference."""
        config = adapter_configs(model)[self.adapter_name]
        config.inference_mode = False
        model.set_adapter(self.adapter_name)  # type: ignore[operator]

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
        self._check_model(model, sharded=sharded)
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
                self._warn_of_low_rate(base_rates(trainable_deltas(model).values(), optimizer))
        self._first_step = True
        self._watch.begin(model)
        self._remove_hooks()  # of a run that was broken off
        self._hooks = let_gradients_through(model)
        if self.recompute_activations:
            recompute_activations(model)
        self._describe(model, state)
        run = training_run(
            args,
            train_dataloader,
            head_learning_rate=self.head_learning_rate,
            lr_scale=describe_scale(self.lr_scale),
        )
        adapter_configs(model)[self.adapter_name].run = run

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _check_model(self, model: nn.Module, *, sharded: bool) -> None:
        if not is_bitfit(model):
            raise TrainerSetupError(
                "The Trainer's model has no BitFit adapter. Either the callback was added after the Trainer was made: "
                "pass it in `Trainer(..., callbacks=[BitFitCallback(...)])`. Or the model was swapped afterwards: "
                "make a new Trainer for another model, or give the Trainer a `model_init`."
            )
        check_rows(model)
        if not (model in self._prepared or sharded):
            raise TrainerSetupError(
                "The callback did not set up the model that the Trainer trains: the callback was added, or the model "
                "replaced, after the Trainer was made. Pass both to `Trainer(model, callbacks=[BitFitCallback(...)])`."
            )
        check_active(model, self.adapter_name)

    def _warn_of_low_rate(self, rates: set[float]) -> None:
        low = min(rates, default=LOWEST_SENSIBLE_RATE)
        if 0 < low < LOWEST_SENSIBLE_RATE and low not in self._warned:
            self._warned.append(low)
            logger.warning(
                "learning_rate=%g is a rate for full fine-tuning, with which biases hardly move. The BitFit paper "
                "uses 1e-4 to 1e-3, small models want up to 4e-3. Nothing has been changed.",
                low,
            )

    def _describe(self, model: nn.Module, state: TrainerState) -> None:
        config = adapter_configs(model)[self.adapter_name]
        biases = sum(parameter.numel() for parameter in trainable_deltas(model).values())
        head = sum(parameter.numel() for group in trainable_head(model) for parameter in group.values())
        total = sum(p.numel() for name, p in stock_root(model).named_parameters() if not is_adapters(name))
        terms = "all bias terms" if config.bias_terms == "all" else ", ".join(_symbols(config.bias_terms))
        pooler = [path for path in pooler_modules(model) if path in (config.modules_to_save or ())]
        if state.is_world_process_zero:
            logger.info(
                "BitFit trains %s bias parameters (%s) and a head of %s%s, of the model's %s: %.3f %%.",
                f"{biases:,}",
                terms,
                f"{head:,}",
                f" (with the pooler {', '.join(pooler)}, never trained before)" if pooler else "",
                f"{total:,}",
                100 * (biases + head) / max(total, 1),
            )

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
        """Sees whether the loss and the deltas are finite."""
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
        if model is not None and self.recompute_activations:
            recompute_activations(model, enabled=False)
        if model is not None and state.is_world_process_zero:
            self._watch.ended(model, steps=state.global_step)
        run = None if model is None else _run_of(model, self.adapter_name)
        if run is None:
            return
        run.steps, run.epochs = state.global_step, state.epoch
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The model is the best one again, so the last evaluation is not about it.
            best = [entry for entry in state.log_history if entry.get("step") == state.best_global_step]
            run.metrics |= {name: value for entry in best for name, value in evaluation_metrics(entry).items()}
        if self.privacy is not None:
            return  # both tell of the training data
        last = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
        run.seconds, run.train_loss = last.get("train_runtime"), last.get("train_loss")


def _symbols(terms: Any) -> list[str]:
    return [SYMBOLS[term] for term in TERMS if term in terms]


def _run_of(model: nn.Module, adapter_name: str) -> TrainingRun | None:
    config = adapter_configs(model).get(adapter_name)
    return getattr(config, "run", None)
