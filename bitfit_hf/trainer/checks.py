"""What a Trainer must not be set up like: each ends in an error that says how to do it, before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..config import BitFitConfig
from ..errors import OptimizerError, TrainerSetupError
from ..terms.structure import stock_root
from ..terms.token_tensors import check_rows
from ..tuner.layer import BitFitLayer
from ..tuner.state import is_bitfit, tuned_layers

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What a configuration says about the selection; the rest is found out at injection.
_SELECTION = (
    "bias_terms",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "add_missing_biases",
    "train_untrained_pooler",
)
# Optimizers of the Trainer that arrange the parameters themselves, by how their names begin.
_OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")


def check_arguments(args: TrainingArguments) -> None:
    """Refuses arguments with which a Trainer would train or push something else than deltas and head.

    Args:
        args ([`~transformers.TrainingArguments`]): Of the Trainer.

    Raises:
        [`OptimizerError`]: `optim` takes no parameter groups.
        [`TrainerSetupError`]: It would push pickles, or use `nn.DataParallel`.
    """
    _refuse_own_groups(args)
    _refuse_pickle_pushes(args)
    _refuse_data_parallel(args)


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


def _refuse_data_parallel(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise TrainerSetupError(
            f"One process sees {args.n_gpu} GPUs, so the Trainer would use `nn.DataParallel`, in which copies of the "
            "model cannot reach the deltas. Start one process per GPU, as `accelerate launch` does, or show the one "
            "process a single GPU with CUDA_VISIBLE_DEVICES=0."
        )


def sharding_engine(args: TrainingArguments) -> str | None:
    """`"FSDP"` or `"DeepSpeed"` where the Trainer shards the model."""
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    return None


def refuse_sharding_in_place(model: nn.Module, args: TrainingArguments) -> None:
    """Refuses to shard a model that is not wrapped, whether or not an adapter is injected in it already.

    Raises:
        [`TrainerSetupError`]: It would be.
    """
    engine = sharding_engine(args)
    if engine is not None and not isinstance(model, PeftModel):
        raise TrainerSetupError(
            f"{engine} saves and loads adapters of a wrapped model only. Wrap it before the Trainer is made: "
            "`model = get_peft_model(model, BitFitConfig(...))`; the callback takes it from there."
        )


def adapter_configs(model: nn.Module) -> dict[str, BitFitConfig]:
    """The configurations of a model's adapters by name; of a `PeftModel` or of a model with adapters in place."""
    return getattr(model, "peft_config", None) or getattr(stock_root(model), "peft_config", {})


def refuse_other_methods(model: nn.Module) -> None:
    """Refuses a model with adapters of LoRA or any other method of PEFT.

    Raises:
        [`TrainerSetupError`]: It has some.
    """
    configs = [config for config in adapter_configs(model).values() if not isinstance(config, BitFitConfig)]
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, BitFitLayer)]
    names = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs}
    names |= {type(layer).__name__ for layer in layers}
    if names:
        raise TrainerSetupError(
            f"The model has adapters of another method ({', '.join(sorted(names))}), which the callback "
            "does not train. Pass a stock model, or one wrapped with `get_peft_model(model, BitFitConfig(...))`."
        )


def refuse_sentence_model(model: nn.Module) -> None:
    """Refuses a model of sentence-transformers, whose Trainer keeps adapters in files of that library.

    Raises:
        [`TrainerSetupError`]: It is one, stock or wrapped.
    """
    root = stock_root(model)
    if isinstance(getattr(root, "transformers_model", None), PreTrainedModel):
        raise TrainerSetupError(
            f"{type(root).__name__} holds a transformers model, and its own library trains, saves and loads adapters "
            "of that one. Add the adapter with `model.add_adapter(BitFitConfig(...))`, and leave the callback out."
        )


def refuse_best_of_named_adapter(model: nn.Module, args: TrainingArguments, adapter_name: str) -> None:
    """Refuses `load_best_model_at_end` where the Trainer would not find the adapter.

    Raises:
        [`TrainerSetupError`]: It would not.
    """
    if args.load_best_model_at_end and isinstance(model, PeftModel) and adapter_name != "default":
        raise TrainerSetupError(
            f"`load_best_model_at_end` would not load the adapter {adapter_name!r}: PEFT saves every adapter of a "
            'wrapped model but "default" in a folder of its own, where the Trainer does not look. Name the adapter '
            '"default", or pass the Trainer the stock model: the callback injects an adapter of any name.'
        )


def check_same_selection(model: nn.Module, adapter_name: str, config: BitFitConfig | None) -> None:
    """Checks that an adapter that the model has already tunes what a callback's configuration asks for.

    Raises:
        [`TrainerSetupError`]: It tunes something else.
    """
    if config is None:
        return
    present = adapter_configs(model)[adapter_name]
    other = {
        name: (getattr(config, name), getattr(present, name))
        for name in _SELECTION
        if getattr(config, name) != getattr(present, name)
    }
    if other:
        listed = ", ".join(f"{name}={wanted!r} (the model has {has!r})" for name, (wanted, has) in other.items())
        raise TrainerSetupError(
            f"The model has an adapter {adapter_name!r} already, which tunes something else than the callback's "
            f"config asks for: {listed}. Leave out the config, choose another `adapter_name`, or load a fresh base."
        )


def check_set_up(model: nn.Module, adapter_name: str, *, here: bool) -> None:
    """Checks that the model which is about to be trained is the one that the callback has set up.

    Args:
        model (`nn.Module`): The Trainer's.
        adapter_name (`str`): The adapter that is to be trained.
        here (`bool`): Whether this very model has been set up.

    Raises:
        [`TrainerSetupError`]: It is another one, or it computes with another adapter.
    """
    if not is_bitfit(model):
        raise TrainerSetupError(
            "The Trainer's model has no BitFit adapter. Either the callback was added after the Trainer was made: "
            "pass it in `Trainer(..., callbacks=[BitFitCallback(...)])`. Or the model was swapped afterwards: "
            "make a new Trainer for another model, or give the Trainer a `model_init`."
        )
    check_rows(model)
    if not here:
        raise TrainerSetupError(
            "The callback did not set up the model that the Trainer trains: the callback was added, or the model "
            "replaced, after the Trainer was made. Pass both to `Trainer(model, callbacks=[BitFitCallback(...)])`."
        )
    check_active(model, adapter_name)


def check_active(model: nn.Module, adapter_name: str) -> None:
    """Checks that the model computes with the adapter that is to be trained, and with no other.

    Raises:
        [`TrainerSetupError`]: It does not.
    """
    if adapter_name not in adapter_configs(model):
        raise TrainerSetupError(
            f"The model that the Trainer trains has no adapter {adapter_name!r}; it has "
            f"{list(adapter_configs(model))}. Pass the same name to `get_peft_model` and to the callback."
        )
    layers = [layer for _, layer in tuned_layers(model)]
    active = {name for layer in layers for name in layer.active_adapters}
    if active != {adapter_name} or any(layer.disable_adapters or layer.merged for layer in layers):
        raise TrainerSetupError(
            f"The adapter {adapter_name!r} is not the one that the model computes with: active are {sorted(active)}, "
            "and none counts while adapters are disabled or merged. Make the Trainer after `enable_adapters`, "
            "`unmerge_adapter` and after the Trainers of other adapters on this model are done."
        )


def computes_with(model: nn.Module, adapter_name: str) -> bool:
    """Whether the model computes with this adapter and no other, be it merged or not."""
    layers = [layer for _, layer in tuned_layers(model)]
    return all(
        not layer.disable_adapters and set(layer.merged_adapters or layer.active_adapters) == {adapter_name}
        for layer in layers
    )
