"""[`BitFitCallback`]: bias-only fine-tuning for an unmodified `Trainer`."""

from __future__ import annotations

import copy
import logging
import math
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from .config import BitFitConfig, BitFitPeftType
from .errors import OptimizerError, TrainerSetupError
from .files import encode_tensors, write_bytes
from .optim import check_optimizer, optimizer_groups, trainable_deltas, trainable_head
from .run import TrainingRun, installed_versions
from .terms import SYMBOLS, TERMS
from .terms.structure import stock_root
from .tuner.state import head_leaves, is_bitfit, tuned_layers

if TYPE_CHECKING:
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

# The paper searched the grid 1e-4, 4e-4, 7e-4, 1e-3. A rate for full fine-tuning leaves the biases where they are.
LOWEST_SENSIBLE_RATE = 1e-4

# Optimizers of the Trainer that arrange the parameters themselves, by how their names begin.
_OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")
# Where the rate for the head waits until the Trainer makes its optimizer.
_HEAD_RATE = "_bitfit_head_learning_rate"

# What a configuration says about the selection; the rest is found out at injection.
_SELECTION = ("bias_terms", "target_modules", "exclude_modules", "layers_to_transform", "add_missing_biases")


class BitFitCallback(TrainerCallback):
    r"""
    Makes a stock `Trainer` tune the biases and the task head of a stock model, and nothing else.

    When the Trainer is made, the callback injects the deltas into its model in place, or takes a model that
    `get_peft_model` has wrapped as it is. The deltas are trained with the Trainer's learning rate and no weight decay.
    Every checkpoint is small, and what the Trainer offers (resuming, the best model at the end, accumulation, mixed
    precision, gradient checkpointing, `torch_compile`, DDP) works as for any model.

    Args:
        config ([`BitFitConfig`], *optional*):
            What to tune; all biases by default. It is copied, so one callback serves many Trainers.
        head_learning_rate (`float`, *optional*):
            Learning rate of the head; the Trainer's by default. Follows the same schedule from its own base.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the adapter. Several tasks can be trained on one base, one after the other, under several names.

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
        adapter_name: str = "default",
    ) -> None:
        if config is not None and not isinstance(config, BitFitConfig):
            raise TrainerSetupError(f"`config` must be a BitFitConfig, got {type(config).__name__}.")
        if head_learning_rate is not None and not (
            isinstance(head_learning_rate, (int, float))
            and math.isfinite(head_learning_rate)
            and head_learning_rate > 0
        ):
            raise TrainerSetupError(f"`head_learning_rate` must be a positive number, got {head_learning_rate!r}.")
        self.config = config
        self.head_learning_rate = None if head_learning_rate is None else float(head_learning_rate)
        self.adapter_name = adapter_name
        self._prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._warned: list[float] = []

    # --- setting up ---

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Injects the adapter into the Trainer's model, and sees to the optimizer that the Trainer will make."""
        if model is None:
            raise TrainerSetupError("The Trainer has no model to tune.")
        _refuse_own_groups(args)
        _refuse_pickle_pushes(args)
        if not is_bitfit(model) or self.adapter_name not in _configs(model):
            self._inject(model, args)
        else:
            self._check_same_selection(model)
        self._activate(model)
        _set_head_rate(args, self.head_learning_rate)
        self._prepared.add(model)
        if args.learning_rate < LOWEST_SENSIBLE_RATE and args.learning_rate not in self._warned:
            self._warned.append(args.learning_rate)
            logger.warning(
                "learning_rate=%g is a rate for full fine-tuning, with which biases hardly move. The BitFit paper "
                "uses 1e-4 to 1e-3, small models want up to 4e-3. Nothing has been changed.",
                args.learning_rate,
            )

    def _inject(self, model: nn.Module, args: TrainingArguments) -> None:
        if isinstance(model, PeftModel):
            if model.peft_type != BitFitPeftType.BITFIT:
                raise TrainerSetupError(
                    f"The model is a PeftModel of {model.peft_type}, not of BitFit. Pass a stock model, or one "
                    "wrapped with `get_peft_model(model, BitFitConfig(...))`."
                )
            model.add_adapter(self.adapter_name, self._fresh_config())
            return
        if not isinstance(model, PreTrainedModel):
            raise TrainerSetupError(
                f"{type(model).__name__} is no transformers model, so the callback cannot inject adapters in place. "
                "Wrap it first: `model = get_peft_model(model, BitFitConfig(...))`."
            )
        engine = _sharding_engine(args)
        if engine is not None:
            raise TrainerSetupError(
                f"{engine} saves and loads adapters of a wrapped model only. Wrap it before the Trainer is made: "
                "`model = get_peft_model(model, BitFitConfig(...))`; the callback takes it from there."
            )
        model.add_adapter(self._fresh_config(), self.adapter_name)

    def _fresh_config(self) -> BitFitConfig:
        return BitFitConfig() if self.config is None else copy.deepcopy(self.config)

    def _check_same_selection(self, model: nn.Module) -> None:
        if self.config is None:
            return
        present = _configs(model)[self.adapter_name]
        other = {
            name: (getattr(self.config, name), getattr(present, name))
            for name in _SELECTION
            if getattr(self.config, name) != getattr(present, name)
        }
        if other:
            listed = ", ".join(f"{name}={wanted!r} (the model has {has!r})" for name, (wanted, has) in other.items())
            raise TrainerSetupError(
                f"The model has an adapter {self.adapter_name!r} already, which tunes something else than the "
                f"callback's config asks for: {listed}. Leave out the config, choose another `adapter_name`, or load "
                "a fresh base."
            )

    def _activate(self, model: nn.Module) -> None:
        """Makes the adapter the active one, and trainable also if it was loaded for inference."""
        config = _configs(model)[self.adapter_name]
        config.inference_mode = False
        model.set_adapter(self.adapter_name)  # type: ignore[operator]
        for _, layer in tuned_layers(model):
            layer.set_requires_grad(self.adapter_name)
        for _, leaf in head_leaves(model):
            leaf.set_requires_grad(self.adapter_name)

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
        sharded = _sharding_engine(args) is not None
        if not is_bitfit(model):
            raise TrainerSetupError(
                "The Trainer's model has no BitFit adapter. Either the callback was added after the Trainer was made: "
                "pass it in `Trainer(..., callbacks=[BitFitCallback(...)])`. Or the model was swapped afterwards, as "
                "`model_init` does: return `get_peft_model(model, BitFitConfig(...))` from `model_init`."
            )
        if model not in self._prepared and not sharded and not isinstance(model, PeftModel):
            raise TrainerSetupError(
                "The callback was added after the Trainer was made, so it could not set it up. Pass it in "
                "`Trainer(..., callbacks=[BitFitCallback(...)])`."
            )
        if model not in self._prepared:  # from `model_init`, or wrapped by an engine
            if self.adapter_name not in _configs(model):
                raise TrainerSetupError(
                    f"The model that the Trainer trains has no adapter {self.adapter_name!r}; it has "
                    f"{list(_configs(model))}. Pass the same name to `get_peft_model` and to the callback."
                )
            if getattr(args, _HEAD_RATE, None) != self.head_learning_rate:
                raise TrainerSetupError(
                    "The callback was added after the Trainer was made, too late for its `head_learning_rate`. Pass "
                    "it in `Trainer(..., callbacks=[BitFitCallback(...)])`."
                )
        if optimizer is not None and not sharded:
            check_optimizer(
                model,
                optimizer,
                learning_rate=args.learning_rate,
                head_learning_rate=self.head_learning_rate,
            )
        self._describe(model, state)
        _attach_run(model, self.adapter_name, args, train_dataloader)

    def _describe(self, model: nn.Module, state: TrainerState) -> None:
        config = _configs(model)[self.adapter_name]
        biases = sum(parameter.numel() for parameter in trainable_deltas(model).values())
        head = sum(parameter.numel() for group in trainable_head(model) for parameter in group.values())
        total = sum(p.numel() for name, p in stock_root(model).named_parameters() if not _is_ours(name))
        terms = "all bias terms" if config.bias_terms == "all" else ", ".join(_symbols(config.bias_terms))
        if state.is_world_process_zero:
            logger.info(
                "BitFit trains %s bias parameters (%s) and a head of %s, of the model's %s: %.3f %%.",
                f"{biases:,}",
                terms,
                f"{head:,}",
                f"{total:,}",
                100 * (biases + head) / max(total, 1),
            )

    # --- after a step ---

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds to a checkpoint of an in-place model the small file that the Trainer resumes from.

        The Trainer reloads adapters of a `PeftModel` only. For any other model it reads `model.safetensors` into
        `load_state_dict(strict=False)`, so that file holds the deltas and the head under their live names.
        """
        if model is None or isinstance(model, PeftModel) or not args.should_save or _sharding_engine(args) is not None:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        trained = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if _is_ours(name) and self.adapter_name in name.split(".")
        }
        write_bytes(folder / "model.safetensors", encode_tensors(trained))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the metrics for the model card."""
        run = None if model is None else _run_of(model, self.adapter_name)
        if run is not None and metrics:
            run.metrics = {
                name.removeprefix("eval_"): float(value)
                for name, value in metrics.items()
                if name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith("_per_second")
            }

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the figures of the run for the model card."""
        run = None if model is None else _run_of(model, self.adapter_name)
        if run is None:
            return
        run.steps, run.epochs = state.global_step, state.epoch
        last = next((entry for entry in reversed(state.log_history) if "train_runtime" in entry), {})
        run.seconds, run.train_loss = last.get("train_runtime"), last.get("train_loss")


# --- the Trainer's arguments ---


def _refuse_own_groups(args: TrainingArguments) -> None:
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith(_OWN_GROUPS):
        raise OptimizerError(
            f"optim={name!r} arranges the model's parameters itself and cannot train deltas and head alone. Use one "
            "that takes parameter groups, such as 'adamw_torch', 'adafactor', 'sgd' or 'adamw_bnb_8bit'."
        )


def _refuse_pickle_pushes(args: TrainingArguments) -> None:
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if args.push_to_hub and strategy in ("checkpoint", "all_checkpoints"):
        raise TrainerSetupError(
            f"hub_strategy={strategy!r} uploads whole checkpoints, with the optimizer's state as pickles, which a "
            "delta repo never holds. Use hub_strategy='end' or 'every_save'."
        )


def _sharding_engine(args: TrainingArguments) -> str | None:
    """`"FSDP"` or `"DeepSpeed"` where the Trainer shards the model."""
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        return "FSDP"
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true"):
        return "DeepSpeed"
    return None


def _set_head_rate(args: TrainingArguments, rate: float | None) -> None:
    """Has the Trainer make its optimizer with BitFit's groups, from the first step and across resume.

    The Trainer looks `args.optim` up in a table of handlers, and takes the groups that a handler returns instead of
    its own. The handler is wrapped once; it acts only for arguments that carry a rate for the head, so other Trainers
    keep their own groups. Without such a rate the Trainer's groups are right as they are.
    """
    if rate is None:
        vars(args).pop(_HEAD_RATE, None)
        return
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as handlers
    except ImportError as error:
        raise TrainerSetupError(
            "This version of transformers has no place where a callback could set the head's learning rate. Give the "
            "groups to the Trainer instead: `Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {'params': "
            "bitfit_hf.optimizer_groups(model, learning_rate, head_learning_rate=...)}))`, with a wrapped model."
        ) from error
    handler = handlers.get(args.optim)
    if handler is not None and not hasattr(handler, "_bitfit_wraps"):
        handlers[args.optim] = _with_groups(handler)
    setattr(args, _HEAD_RATE, rate)


def _with_groups(handler: Any) -> Any:
    def with_groups(context: Any) -> tuple[Any, dict[str, Any]]:
        optimizer_cls, kwargs = handler(context)
        rate = getattr(context.args, _HEAD_RATE, None)
        if rate is not None and context.model is not None and is_bitfit(context.model):
            kwargs["params"] = optimizer_groups(
                context.model,
                context.args.learning_rate,
                head_learning_rate=rate,
                weight_decay=context.args.weight_decay,
            )
        return optimizer_cls, kwargs

    with_groups._bitfit_wraps = handler  # type: ignore[attr-defined]
    return with_groups


# --- the model ---


def _configs(model: nn.Module) -> dict[str, BitFitConfig]:
    return getattr(model, "peft_config", None) or getattr(stock_root(model), "peft_config", {})


def _is_ours(name: str) -> bool:
    """Whether a live name is that of a delta or of a head's copy."""
    parts = name.split(".")
    return "modules_to_save" in parts or any(part.startswith("bitfit_") for part in parts)


def _symbols(terms: Any) -> list[str]:
    return [SYMBOLS[term] for term in TERMS if term in terms]


def _attach_run(model: nn.Module, adapter_name: str, args: TrainingArguments, dataloader: Any) -> None:
    dataset = getattr(dataloader, "dataset", None)
    builder = getattr(getattr(dataset, "info", None), "dataset_name", None)
    _configs(model)[adapter_name].run = TrainingRun(
        hyperparameters={
            "learning_rate": args.learning_rate,
            "head_learning_rate": getattr(args, _HEAD_RATE, None),
            "train_batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "num_train_epochs": args.num_train_epochs if args.max_steps <= 0 else None,
            "max_steps": args.max_steps if args.max_steps > 0 else None,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "warmup_steps": args.warmup_steps or None,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "optim": str(getattr(args.optim, "value", args.optim)),
            "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
            "seed": args.seed,
        },
        num_examples=len(dataset) if hasattr(dataset, "__len__") else None,
        dataset=builder,
        versions=installed_versions(),
    )


def _run_of(model: nn.Module, adapter_name: str) -> TrainingRun | None:
    config = _configs(model).get(adapter_name)
    return getattr(config, "run", None)
