"""Rates by term: which bias learns how fast, by every way that an optimizer comes about, and after a resume."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from architectures import ARCHITECTURES, build
from peft import get_peft_model
from trainer_tester import WAYS, WRAPPED, Recorder, fresh, prepared, same, trainer_for, tuned
from transformers import BertConfig, CLIPConfig, GPT2Config
from tuner_tester import config_for

from bitfit_hf import (
    BitFitCallback,
    BitFitConfig,
    ConfigError,
    OptimizerError,
    UnknownTermError,
    optimizer_groups,
    recommended_learning_rate,
)
from bitfit_hf.terms import TERMS
from bitfit_hf.trainer.rates import DEFAULT_SCALE, describe_scale, term_scale

RATE = 1e-2
INSIDE = ("query", "key", "value", "intermediate")
MODULES = {"query": "query", "key": "key", "value": "value", "intermediate": "intermediate.dense"}


def rates_by_name(model: torch.nn.Module, groups) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


def is_inside(name: str) -> bool:
    return any(f".{module}." in name for module in MODULES.values())


# --- what a scale says ---


def test_the_default_scale():
    faster = (*INSIDE, "head")
    assert dict.fromkeys(faster, 3.0) == DEFAULT_SCALE
    assert term_scale("default") == {name: 3.0 if name in faster else 1.0 for name in (*TERMS, "head")}
    assert term_scale("uniform") == term_scale({}) == dict.fromkeys((*TERMS, "head"), 1.0)


def test_terms_symbols_and_presets_are_keys():
    scale = term_scale({"b_q": 2, "output_layernorm": 0.5})
    assert {term for term, factor in scale.items() if factor != 1.0} == {"query", "output_layernorm"}
    assert (scale["query"], scale["output_layernorm"]) == (2.0, 0.5)
    assert term_scale({"head": 0.5})["head"] == 0.5
    assert term_scale({"query+intermediate": 4.0}) == term_scale({"query": 4.0, "intermediate": 4.0})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("lamb", ConfigError, "'default', 'uniform' or a mapping"),
        (3.0, ConfigError, "mapping of terms to numbers, got 3.0"),
        ({"b_m4": 2.0}, UnknownTermError, "`lr_scale`: .*'b_m4'"),
        ({"query": 0.0}, ConfigError, "'query' is 0.0, not a positive number; to leave a term out"),
        ({"query": -1}, ConfigError, "not a positive number"),
        ({"query": math.inf}, ConfigError, "not a positive number"),
        ({"query": True}, ConfigError, "not a positive number"),
        ({"query": "3"}, ConfigError, "not a positive number"),
        ({"query": 2.0, "b_q": 3.0}, ConfigError, "'query' is named twice, again by 'b_q'"),
    ],
)
def test_wrong_scales_are_told_before_anything_is_prepared(given, error, message):
    with pytest.raises(error, match=message):
        BitFitCallback(lr_scale=given)
    with pytest.raises(error, match=message):
        optimizer_groups(prepared(WRAPPED), RATE, lr_scale=given)


def test_a_scale_in_words():
    assert describe_scale("default") == "b_q, b_k, b_v, b_m2, head × 3"
    assert describe_scale("default", with_head=False) == "b_q, b_k, b_v, b_m2 × 3"
    assert describe_scale({"head": 2}) == "head × 2"
    assert describe_scale("uniform") == "uniform"
    assert describe_scale({"b_LN1": 0.5, "b_q": 2}) == "b_LN1 × 0.5; b_q × 2"


# --- the groups ---


def test_groups_of_bert_by_default():
    model = prepared(WRAPPED)
    groups = optimizer_groups(model, RATE, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("delta", RATE, 0.0),
        ("delta:query+key+value+intermediate", 3 * RATE, 0.0),
        ("head", 3 * RATE, 0.1),
        ("head_no_decay", 3 * RATE, 0.0),
    ]
    found = rates_by_name(model, groups)
    deltas = {name: rate for name, rate in found.items() if "bitfit_" in name}
    assert len(deltas) == 18
    assert sum(is_inside(name) for name in deltas) == 8
    assert all(rate == (3 * RATE if is_inside(name) else RATE) for name, rate in deltas.items())
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_term_can_have_its_own_rate():
    model = prepared(WRAPPED)
    scale = {term: 1.0 + place for place, term in enumerate(TERMS)}
    groups = optimizer_groups(model, RATE, lr_scale=scale)
    deltas = [group for group in groups if group["name"].startswith("delta")]
    assert [group["lr"] for group in deltas] == pytest.approx([RATE * scale[term] for term in TERMS[:10]])
    assert [group["name"] for group in deltas][:3] == ["delta", "delta:key", "delta:value"]


@pytest.mark.parametrize("name", [name for name, arch in ARCHITECTURES.items() if arch.is_transformers])
def test_the_default_suits_every_architecture(name: str):
    """Fused projections have one rate, and every delta is in exactly one group."""
    model = get_peft_model(build(name), config_for(ARCHITECTURES[name]))
    groups = optimizer_groups(model, RATE)
    found = list(itertools.chain.from_iterable(group["params"] for group in groups))
    assert len(found) == len(set(map(id, found)))
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert set(map(id, found)) == trained


def test_a_fused_vector_has_one_rate():
    model = get_peft_model(build("gpt2-sequence"), BitFitConfig())
    with pytest.raises(ConfigError, match=r"c_attn\.bias holds several terms in one vector: query 2, key 1, value 1"):
        optimizer_groups(model, RATE, lr_scale={"query": 2.0})
    optimizer_groups(model, RATE, lr_scale={"query": 2.0, "key": 2.0, "value": 2.0})
    alone = get_peft_model(build("gpt2-sequence"), BitFitConfig(bias_terms="query"))
    assert optimizer_groups(alone, RATE, lr_scale={"query": 2.0})[0]["lr"] == 2 * RATE


# --- with a Trainer ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "rmsprop"])
def test_a_trainer_uses_them_with_every_schedule(tmp_path, optim: str, way: str):
    seen = Recorder()
    trainer = trainer_for(
        prepared(way), tmp_path, BitFitCallback(), seen, learning_rate=RATE, optim=optim, lr_scheduler_type="cosine"
    )
    trainer.train()
    assert len(seen.rates) == 4
    start = seen.rates[0]
    assert start == pytest.approx([RATE, 3 * RATE, 3 * RATE, 3 * RATE])
    for rates in seen.rates:
        assert rates == pytest.approx([rates[0], *[3 * rates[0]] * 3])
    assert seen.rates[-1][0] < start[0]


def test_the_card_tells_the_rates(tmp_path):
    trainer = trainer_for(fresh(), tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert "b_q, b_k, b_v, b_m2, head × 3" in (tmp_path / "out" / "README.md").read_text()


def test_a_rate_of_its_own_for_the_head_wins_and_the_card_does_not_multiply_it(tmp_path):
    groups = optimizer_groups(prepared(WRAPPED), RATE, head_learning_rate=RATE / 2)
    assert [group["lr"] for group in groups if group["name"].startswith("head")] == [RATE / 2] * 2
    trainer = trainer_for(fresh(), tmp_path, BitFitCallback(head_learning_rate=RATE / 2), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "b_q, b_k, b_v, b_m2 × 3" in card
    assert "0.005" in card


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = trainer_for(fresh(dropout=0.1), tmp_path, learning_rate=RATE, save_steps=2)
    whole.train()
    again = trainer_for(fresh(dropout=0.1), tmp_path, learning_rate=RATE, save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(tuned(again.model), tuned(whole.model))
    assert len({group["lr"] for group in again.optimizer.param_groups}) <= 2


@pytest.mark.parametrize(
    ("width", "rate"), [(1024, 1e-3), (768, 1e-3), (512, 1.5e-3), (384, 2e-3), (32, 2e-3), (0, 1e-3)]
)
def test_narrow_models_have_a_larger_rate(width: int, rate: float):
    for kind in (BertConfig(hidden_size=width), GPT2Config(n_embd=width)):
        assert recommended_learning_rate(kind) == pytest.approx(rate)


def test_the_width_is_that_of_the_text_and_may_be_unknown():
    clip = CLIPConfig(text_config={"hidden_size": 512, "num_attention_heads": 8}, vision_config={"hidden_size": 96})
    assert recommended_learning_rate(clip) == pytest.approx(1.5e-3)
    assert recommended_learning_rate(prepared(WRAPPED)) == 2e-3
    assert recommended_learning_rate(torch.nn.Linear(2, 2)) == 1e-3


def test_a_run_is_resumed_with_its_rates_only(tmp_path):
    def make(**values):
        return trainer_for(fresh(), tmp_path, BitFitCallback(**values), learning_rate=RATE, save_steps=2)

    make().train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(OptimizerError, match="with another `lr_scale`"):
        make(lr_scale="uniform").train(resume_from_checkpoint=checkpoint)
    with pytest.raises(OptimizerError, match="learning rate of the deltas of query"):
        make(lr_scale=dict.fromkeys(INSIDE, 2.0)).train(resume_from_checkpoint=checkpoint)
