"""Twenty steps of the tuner against a stock model whose biases were unfrozen by hand, parameter by parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn
from trainer_tester import (
    IN_PLACE,
    WAYS,
    WRAPPED,
    arguments,
    fresh,
    in_order,
    losses,
    prepared,
    rows,
    stock_trainer,
    trainer_for,
)
from tuner_tester import base_tensors, same_tensors

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig

STEPS, TOLERANCE = 20, 1e-5
NO_KEY = "query value attention_output attention_layernorm intermediate output output_layernorm embedding_layernorm"
NO_KEY = [*NO_KEY.split(), "pooler", "lm_head", "other"]


@dataclass
class Case:
    """An architecture, what to tune in it, and by which names of parameters that is done by hand.

    Args:
        name (`str`): Of the architecture.
        head (`str`): Pattern of the head's parameters, all of them trained.
        biases (`str`): Pattern of the biases.
        parts (`dict`): For a fused bias, pattern of its name and the slices of it that are tuned.
        config (`dict`): The same choice for [`BitFitConfig`].
    """

    name: str
    head: str
    biases: str
    parts: dict[str, list[slice]]
    config: dict[str, Any]

    def unfreeze(self, model: nn.Module) -> list[str]:
        """Unfreezes the biases and the head; returns the names of the biases."""
        found = []
        for name, parameter in model.named_parameters():
            bias = re.fullmatch(self.biases, name) is not None
            parameter.requires_grad = bias or re.fullmatch(self.head, name) is not None
            if bias:
                found.append(name)
            for pattern, slices in self.parts.items():
                if re.fullmatch(pattern, name):
                    parameter.register_hook(_only(slices, parameter))
        return found


def _only(slices: list[slice], parameter: torch.Tensor) -> Any:
    mask = torch.zeros_like(parameter)
    for part in slices:
        mask[part] = 1
    return lambda gradient: gradient * mask


# The gradient of a key bias is rounding noise, which Adam turns into steps: AdamW is compared without the keys.
CASES = {
    "bert": Case("bert-sequence", r"classifier\..*", r"bert\..*\.bias", {}, {}),
    "bert-without-key": Case(
        "bert-sequence", r"classifier\..*", r"bert\.(?!.*\.key\.).*\.bias", {}, {"bias_terms": NO_KEY}
    ),
    "bert-subset": Case(
        "bert-sequence",
        r"classifier\..*",
        r".*\.(query|intermediate\.dense)\.bias",
        {},
        {"bias_terms": "query+intermediate"},
    ),
    "gpt2": Case("gpt2-sequence", r"score\.weight", r".*\.bias", {}, {}),
    "gpt2-without-key": Case(
        "gpt2-sequence",
        r"score\.weight",
        r".*\.bias",
        {r".*\.c_attn\.bias": [slice(0, 32), slice(64, 96)]},
        {"bias_terms": NO_KEY},
    ),
    "gpt2-query": Case(
        "gpt2-sequence",
        r"score\.weight",
        r".*\.c_attn\.bias",
        {r".*\.c_attn\.bias": [slice(0, 32)]},
        {"bias_terms": "query"},
    ),
    "deberta": Case("deberta-sequence", r"(pooler|classifier)\..*", r"deberta\..*(bias|q_bias|v_bias)", {}, {}),
    "vit": Case("vit-image", r"classifier\..*", r"vit\..*\.bias", {}, {}),
    "vit-without-key": Case(
        "vit-image", r"classifier\..*", r"vit\.(?!.*\.k_proj\.).*\.bias", {}, {"bias_terms": NO_KEY}
    ),
    "vit-one-layer": Case("vit-image", r"classifier\..*", r"vit\.layers\.1\..*\.bias", {}, {"layers_to_transform": 1}),
}
RUNS = [
    *[(case, "sgd") for case in CASES],
    *[(case, "adamw_torch") for case in ("bert-without-key", "bert-subset", "gpt2-without-key", "gpt2-query")],
    *[(case, "adamw_torch") for case in ("deberta", "vit-without-key")],
]


def settings(folder: Path, optim: str) -> Any:
    rate = 0.1 if optim == "sgd" else 1e-2
    return arguments(folder, optim=optim, learning_rate=rate, max_steps=STEPS, weight_decay=0.0, **in_order())


@pytest.mark.parametrize(("case", "optim"), RUNS, ids=lambda value: value)
def test_twenty_steps_equal_a_model_unfrozen_by_hand(case: str, optim: str, tmp_path: Path) -> None:
    spec = CASES[case]
    data = rows(32, spec.name)
    start = dict(fresh(spec.name).state_dict())

    oracle = fresh(spec.name)
    biases = spec.unfreeze(oracle)
    by_hand = stock_trainer(oracle, settings(tmp_path, optim), train=data)
    by_hand.train()
    stock = dict(oracle.state_dict())
    trained = [*biases, *[name for name in stock if re.fullmatch(spec.head, name)]]
    # The comparison means something: every bias but the dead ones goes further than it tolerates.
    still = [name for name in trained if (stock[name] - start[name]).abs().max() < 5 * TOLERANCE]
    assert biases
    assert all(".key." in name or ".k_proj." in name for name in still), still

    for way in WAYS:
        config = BitFitConfig(**spec.config)
        model = prepared(way, config, spec.name)
        trainer = trainer_for(
            model, tmp_path, BitFitCallback(config, lr_scale="uniform"), train=data, args=settings(tmp_path, optim)
        )
        trainer.train()
        found = losses(trainer)
        assert len(found) == STEPS
        assert max(abs(a - b) for a, b in zip(losses(by_hand), found, strict=True)) < TOLERANCE

        after = dict(BiasDelta.from_model(model).apply_(fresh(spec.name)).state_dict())
        assert max((after[name] - stock[name]).abs().max().item() for name in trained) < TOLERANCE
        # What was not chosen is as it was, and so are the base's own biases, beside which the deltas are kept.
        assert {name for name in start if not torch.equal(start[name], after[name])} <= set(trained)
        assert same_tensors(base_tensors(model), base_tensors(fresh(spec.name)))


@pytest.mark.parametrize("way", WAYS)
def test_an_untouched_slice_of_a_fused_bias_is_not_stored(way: str, tmp_path: Path) -> None:
    config = BitFitConfig(bias_terms="query")
    model = prepared(way, config, "gpt2-sequence")
    trainer_for(model, tmp_path, BitFitCallback(config), train=rows(8, "gpt2-sequence")).train()

    delta = BiasDelta.from_model(model)
    assert {name: tuple(value.shape) for name, value in delta.items()} == {
        f"transformer.h.{layer}.attn.c_attn.bias": (32,) for layer in range(2)
    }
    before, after = fresh("gpt2-sequence"), delta.apply_(fresh("gpt2-sequence"))
    for layer in range(2):
        old, new = (m.transformer.h[layer].attn.c_attn.bias for m in (before, after))
        assert torch.equal(old[32:], new[32:])
        assert not torch.equal(old[:32], new[:32])


def test_both_ways_train_the_same_bit_by_bit(tmp_path: Path) -> None:
    states = {}
    for way in (IN_PLACE, WRAPPED):
        model = prepared(way, dropout=0.1)
        trainer_for(model, tmp_path, BitFitCallback(dropout=True), max_steps=5).train()
        states[way] = BiasDelta.from_model(model)
    assert same_tensors(dict(states[IN_PLACE]), dict(states[WRAPPED]))
    assert same_tensors(states[IN_PLACE].head, states[WRAPPED].head)


def test_every_case_names_an_architecture() -> None:
    assert {case.name for case in CASES.values()} <= ARCHITECTURES.keys()
    assert {case for case, _ in RUNS} == CASES.keys()
