"""Putting a Trainer's adapter into its model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..config import BitFitConfig
from ..errors import TrainerSetupError
from ..tuner.lifecycle import begin_anew
from ..tuner.state import is_bitfit
from .checkpoints import accept_checkpoints
from .checks import (
    adapter_configs,
    check_arguments,
    check_same_selection,
    refuse_best_of_named_adapter,
    refuse_other_methods,
    refuse_sentence_model,
    refuse_sharding_in_place,
)
from .push import check_base_name

if TYPE_CHECKING:
    from transformers import TrainingArguments


def prepare_model(model: nn.Module, args: TrainingArguments, config: BitFitConfig | None, adapter_name: str) -> None:
    """Makes `model` compute with the adapter that its Trainer is going to train, injecting it where there is none.

    Args:
        model (`nn.Module`): A transformers model, or one that `get_peft_model` has wrapped.
        args ([`~transformers.TrainingArguments`]): Of the Trainer.
        config ([`BitFitConfig`], *optional*): What to tune; it is copied.
        adapter_name (`str`): Name of the adapter.

    Raises:
        [`TrainerSetupError`]: The Trainer would train or push something else; the model is as it was.
        [`OptimizerError`]: Its optimizer would.
    """
    check_arguments(args)
    refuse_other_methods(model)
    refuse_sentence_model(model)
    refuse_sharding_in_place(model, args)
    if args.push_to_hub:
        check_base_name(model, adapter_name, config)
    refuse_best_of_named_adapter(model, args, adapter_name)
    if not is_bitfit(model) or adapter_name not in adapter_configs(model):
        _inject(model, config, adapter_name)
    else:
        check_same_selection(model, adapter_name, config)
    adapter_configs(model)[adapter_name].inference_mode = False  # trainable also if it was loaded for inference
    model.set_adapter(adapter_name)  # type: ignore[operator]
    accept_checkpoints(model)


def _inject(model: nn.Module, config: BitFitConfig | None, adapter_name: str) -> None:
    fresh = BitFitConfig() if config is None else copy.deepcopy(config)
    begin_anew(fresh)  # read from a delta's file it would wait for that delta's tensors
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, fresh)
    elif isinstance(model, PreTrainedModel):
        model.add_adapter(fresh, adapter_name)
    else:
        raise TrainerSetupError(
            f"{type(model).__name__} is no transformers model, so the callback cannot inject adapters in place. "
            "Wrap it first: `model = get_peft_model(model, BitFitConfig(...))`."
        )
