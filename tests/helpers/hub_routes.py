"""Every way of loading a delta of a Hub repository, by its name."""

from __future__ import annotations

from typing import Any

import torch
from hub_deltas import load_base, tune
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification

from bitfit_hf import BiasDelta, load_delta
from bitfit_hf.tuner.state import delta_parameters, head_tensors


def by_name(repo_id: str, *, revision: str | None = None, **kwargs: Any) -> Any:
    own = {} if revision is None else {"adapter_kwargs": {"revision": revision}}
    return AutoModelForSequenceClassification.from_pretrained(repo_id, **own, **kwargs)


def auto_peft(repo_id: str, **kwargs: Any) -> Any:
    # PEFT hands `revision` to the adapter alone; the base comes at the commit that the adapter pins.
    return AutoPeftModelForSequenceClassification.from_pretrained(repo_id, **kwargs)


def peft_model(repo_id: str, **kwargs: Any) -> Any:
    return PeftModel.from_pretrained(load_base(), repo_id, **kwargs)


def second_adapter(repo_id: str, **kwargs: Any) -> Any:
    model = tune(load_base(), seed=9, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    model.load_adapter(repo_id, "second", **kwargs)
    model.set_adapter("second")
    return model


def load_adapter(repo_id: str, **kwargs: Any) -> Any:
    model = load_base()
    model.load_adapter(repo_id, adapter_kwargs=kwargs)
    return model


def load_in_place(repo_id: str, **kwargs: Any) -> Any:
    return load_delta(load_base(), repo_id, **kwargs)


def as_a_value(repo_id: str, **kwargs: Any) -> Any:
    return BiasDelta.from_pretrained(repo_id, **kwargs).apply_(load_base())


ROUTES = {
    "AutoModelForSequenceClassification": by_name,
    "AutoPeftModelForSequenceClassification": auto_peft,
    "PeftModel.from_pretrained": peft_model,
    "PeftModel.load_adapter": second_adapter,
    "model.load_adapter": load_adapter,
    "load_delta": load_in_place,
    "BiasDelta.from_pretrained": as_a_value,
}


def tensors_of(model: Any) -> dict[str, torch.Tensor] | None:
    """Delta and head of the active adapter, live; `None` where they have been written into the base's own tensors."""
    configs = getattr(model, "peft_config", {})
    name = "second" if "second" in configs else "default"
    found = {**delta_parameters(model, name), **head_tensors(model, name)}
    return {key: value.detach() for key, value in found.items()} or None
