"""Deltas written into a stock model, and what the user does to the model in between.

The oracle is addition by hand: `b_0 + δ` of the base at hand, and nothing of what was applied before.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from architectures import ARCHITECTURES, build, randomize_
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
)
from tuner_tester import Tensors, add_by_hand, base_tensors, config_for, fill_, same_tensors, state

from bitfit_hf import (
    BaseModelMismatchError,
    BiasDelta,
    BitFitConfig,
    DeltaMismatchError,
    MergeError,
    TaskBank,
    UnsupportedLayerError,
    load_delta,
)
from bitfit_hf.delta.applying import is_applied
from bitfit_hf.delta.lora_export import export_stock
from bitfit_hf.storage.fingerprint import differences, fingerprint
from bitfit_hf.terms import find_biases

BERT = "bert-sequence"


def delta_of(base: nn.Module, seed: int, **values) -> BiasDelta:
    """A delta on `base` with random values, as if it had been trained."""
    values = {"base_model_name_or_path": "user/base", **values}
    return BiasDelta.from_model(fill_(get_peft_model(copy.deepcopy(base), BitFitConfig(**values)), seed=seed))


def by_hand(base: nn.Module, *deltas: BiasDelta) -> Tensors:
    """What a model on `base` holds with these deltas in it."""
    model = copy.deepcopy(base)
    for delta in deltas:
        tensors = {key.removeprefix("base_model.model."): value for key, value in delta.tensors().items()}
        add_by_hand(model, tensors)
    return base_tensors(model)


@pytest.fixture
def base() -> nn.Module:
    return randomize_(build(BERT))


@pytest.fixture
def other_base() -> nn.Module:
    return randomize_(build(BERT), seed=7)


# --- the base is checked each time ---


def test_the_base_is_checked_when_another_delta_has_been_applied_before(base, other_base, tmp_path):
    mine, foreign = delta_of(base, 1), delta_of(other_base, 2)
    foreign.save_pretrained(tmp_path)
    model = mine.apply_(copy.deepcopy(base))
    before = state(model)
    for apply in (foreign.apply_, lambda model: load_delta(model, tmp_path)):
        with pytest.raises(BaseModelMismatchError, match="tensors differ"):
            apply(model)
        assert state(model) == before
    with pytest.warns(UserWarning, match="tensors differ"):
        foreign.apply_(model, on_base_mismatch="warn")
    assert same_tensors(base_tensors(model), by_hand(base, mine, foreign))
    foreign.remove_(model)
    assert same_tensors(base_tensors(model), by_hand(base, mine))


def test_the_base_is_what_was_there_before_the_deltas(base):
    model = delta_of(base, 1).apply_(copy.deepcopy(base))
    biases = find_biases(model)
    assert fingerprint(model, biases) == fingerprint(base, biases)
    assert differences(model, fingerprint(base, biases)) == []


# --- another state dict in between ---


def test_a_state_dict_of_the_base_between_two_deltas(base):
    """The loop that serves one task after the other: nothing of the last one may be left."""
    model = copy.deepcopy(base)
    for seed in range(4):
        delta = delta_of(base, seed)
        model.load_state_dict(base.state_dict())
        delta.apply_(model)
        assert same_tensors(base_tensors(model), by_hand(base, delta)), seed
    delta.remove_(model)
    assert same_tensors(base_tensors(model), base_tensors(base))


def test_a_state_dict_of_another_base_between_two_deltas(base, other_base):
    model = delta_of(base, 1).apply_(copy.deepcopy(base))
    model.load_state_dict(other_base.state_dict())
    before = state(model)
    with pytest.raises(BaseModelMismatchError, match="tensors differ"):
        delta_of(base, 2).apply_(model)
    assert state(model) == before
    mine = delta_of(other_base, 3)
    mine.apply_(model)
    assert same_tensors(base_tensors(model), by_hand(other_base, mine))
    mine.remove_(model)
    assert same_tensors(base_tensors(model), base_tensors(other_base))


def test_labels_and_head_start_anew_with_the_biases(base):
    own = dict(base.config.id2label)
    names = {index: f"star{index}" for index in range(5)}
    five = delta_of(base, 1, num_labels=5, id2label=names)
    headless = delta_of(base, 2) - delta_of(base, 3)
    assert not headless.head
    model = five.apply_(copy.deepcopy(base))
    assert model.config.id2label == names
    model.bert.load_state_dict(base.bert.state_dict())  # the head of five labels stays
    headless.apply_(model)
    assert model.config.id2label == own
    assert same_tensors(base_tensors(model), by_hand(base, headless))

    renamed = delta_of(base, 4, id2label=dict.fromkeys(own, "x") | {0: "y"})
    model = renamed.apply_(copy.deepcopy(base))
    assert model.config.id2label != own
    model.load_state_dict(base.state_dict())
    headless.apply_(model)
    assert model.config.id2label == own
    headless.remove_(model)
    assert same_tensors(base_tensors(model), base_tensors(base))


def test_what_was_loaded_over_cannot_be_taken_out(base):
    delta = delta_of(base, 1)
    model = delta.apply_(copy.deepcopy(base))
    tuned = copy.deepcopy(model.state_dict())
    model.load_state_dict(base.state_dict())
    before = state(model)
    with pytest.raises(DeltaMismatchError, match="not there any more"):
        delta.remove_(model)
    assert state(model) == before
    model.load_state_dict(tuned)
    delta.remove_(model)
    assert same_tensors(base_tensors(model), base_tensors(base))


def test_a_part_that_was_changed_is_named(base):
    delta = delta_of(base, 1)
    model = delta.apply_(copy.deepcopy(base))
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] += 1
    before = state(model)
    for change in (delta_of(base, 2).apply_, delta.remove_):
        with pytest.raises(DeltaMismatchError, match=r"bert\.pooler\.dense\.bias was changed\n"):
            change(model)
        assert state(model) == before


def test_a_delta_that_leaves_most_biases_alone(base):
    """Where `δ` is zero, what was written equals `b_0`, and says nothing of what has happened since."""
    delta = delta_of(base, 1)
    for name in delta:
        if not name.endswith("query.bias"):
            delta[name].zero_()
    model = delta.apply_(copy.deepcopy(base))
    model.load_state_dict(base.state_dict())
    second = delta_of(base, 2)
    second.apply_(model)
    assert same_tensors(base_tensors(model), by_hand(base, second))


def test_added_biases_are_a_part_like_any_other():
    arch = ARCHITECTURES["qwen2-causal_lm"]
    base = randomize_(arch.build())
    first, second = (
        BiasDelta.from_model(fill_(get_peft_model(copy.deepcopy(base), BitFitConfig(add_missing_biases=True)), seed=s))
        for s in (1, 2)
    )
    assert {group[0].exists for group in first.biases.values()} == {True, False}
    model = first.apply_(copy.deepcopy(base))
    second.apply_(model)
    assert same_tensors(base_tensors(model), by_hand(base, first, second))
    model.load_state_dict(base.state_dict(), strict=False)  # knows nothing of the added ones
    with pytest.raises(DeltaMismatchError, match=r"q_proj\.bias was changed"):
        second.remove_(model)


# --- what else can happen to the model ---


@pytest.mark.parametrize("way", [("bfloat16",), ("float16",), ("bfloat16", "float32"), ("float16", "float32")])
def test_a_cast_is_no_change(way, base):
    first, second = delta_of(base, 1), delta_of(base, 2)
    model, plain = copy.deepcopy(base), copy.deepcopy(base)
    first.apply_(model)
    for dtype in way:
        model.to(getattr(torch, dtype))
        plain.to(getattr(torch, dtype))
    # What was rounded for good is another base for the fingerprint; the ledger still knows what it wrote.
    second.apply_(model, on_base_mismatch="ignore" if len(way) > 1 else "raise")
    for name in first:
        exact = base.get_parameter(name) + first[name] + second[name]
        assert torch.equal(model.get_parameter(name), exact.to(getattr(torch, way[-1]))), name
    second.remove_(model)
    first.remove_(model)
    for name in first:
        assert torch.equal(model.get_parameter(name), base.get_parameter(name).to(getattr(torch, way[-1]))), name
    assert not is_applied(model)


def test_a_delta_changed_after_it_was_applied_leaves_the_model_alone(base):
    first, second = delta_of(base, 1), delta_of(base, 2)
    expected = by_hand(base, first, second)
    model = first.apply_(copy.deepcopy(base))
    for tensor in first.values():
        tensor.mul_(100)
    second.apply_(model)
    assert same_tensors(base_tensors(model), expected)


def test_a_copy_says_that_it_holds_a_delta(base):
    delta = delta_of(base, 1)
    model = delta.apply_(copy.deepcopy(base))
    twin = copy.deepcopy(model)
    with pytest.raises(DeltaMismatchError, match="it is a copy of"):
        delta_of(base, 2).apply_(twin)
    with pytest.raises(DeltaMismatchError, match="not applied"):
        delta.remove_(twin)
    assert is_applied(twin)
    delta.remove_(model)
    assert is_applied(twin)
    assert not is_applied(model)
    twin.load_state_dict(base.state_dict())
    second = delta_of(base, 2)
    second.apply_(twin)
    assert same_tensors(base_tensors(twin), by_hand(base, second))


def test_a_part_that_holds_a_delta_is_named(base):
    inner = BiasDelta.from_model(fill_(get_peft_model(copy.deepcopy(base.bert), BitFitConfig()), seed=1))
    model = copy.deepcopy(base)
    inner.apply_(model.bert)
    before = state(model)
    with pytest.raises(DeltaMismatchError, match=r"(?s)applied to a part of it.*bert\.embeddings"):
        delta_of(base, 2).apply_(model)
    assert state(model) == before


def test_a_model_with_a_delta_in_it_is_a_stock_model(base):
    model = delta_of(base, 1).apply_(copy.deepcopy(base))
    kinds = {type(value).__module__ for module in model.modules() for value in vars(module).values()}
    assert not any(kind.startswith("bitfit_hf") for kind in kinds)
    again = pickle.loads(pickle.dumps(model))
    assert same_tensors(base_tensors(again), base_tensors(model))


def test_nothing_is_left_beside_a_layer(base):
    delta = delta_of(base, 1)
    model = copy.deepcopy(base)
    before = [sorted(vars(module)) for module in model.modules()]
    delta.remove_(delta.apply_(model))
    assert [sorted(vars(module)) for module in model.modules()] == before
    wrapped = fill_(get_peft_model(model, BitFitConfig()))
    wrapped.merge_and_unload()
    assert [sorted(vars(module)) for module in model.modules()] == before


def test_a_delta_without_a_head_leaves_the_head_alone(base):
    headless = delta_of(base, 2) - delta_of(base, 3)
    model = delta_of(base, 1).apply_(copy.deepcopy(base))
    with torch.no_grad():
        model.classifier.weight.add_(1)  # trained on, say
    model.config.id2label = {0: "a", 1: "b"}
    kept = model.classifier.weight.clone()
    headless.apply_(model)
    assert torch.equal(model.classifier.weight, kept)
    headless.remove_(model)
    assert torch.equal(model.classifier.weight, kept)
    assert model.config.id2label == {0: "a", 1: "b"}


# --- what stands on the base's own biases ---


def test_what_needs_the_base_is_refused_while_a_delta_is_in_it_and_no_longer(base, tmp_path):
    delta = delta_of(base, 1)
    delta.save_pretrained(tmp_path / "delta")

    def uses(model: nn.Module):
        return {
            "bank": lambda: TaskBank(model),
            "stock": lambda: export_stock(delta, tmp_path / "stock", base=model),
            "get_peft_model": lambda: get_peft_model(model, BitFitConfig()),
            "add_adapter": lambda: model.add_adapter(BitFitConfig()),
            "PeftModel": lambda: PeftModel.from_pretrained(model, tmp_path / "delta"),
        }

    for name in uses(base):
        model = delta.apply_(copy.deepcopy(base))
        before = state(model)
        with pytest.raises(ValueError if name in ("bank", "stock") else UnsupportedLayerError, match="delta"):
            uses(model)[name]()
        assert state(model) == before
        model.load_state_dict(base.state_dict())
        uses(model)[name]()
        model = delta.remove_(delta.apply_(copy.deepcopy(base)))
        uses(model)[name]()


def test_a_merged_model_is_a_base_of_its_own(base):
    merged = fill_(get_peft_model(copy.deepcopy(base), BitFitConfig()), seed=1).merge_and_unload()
    assert not is_applied(merged)
    biases = find_biases(merged)
    assert fingerprint(merged, biases) != fingerprint(base, biases)
    delta = delta_of(merged, 2)
    tensors = base_tensors(merged)
    delta.remove_(delta.apply_(merged))
    assert same_tensors(base_tensors(merged), tensors)


def test_the_base_of_two_checkpoints_is_read_under_the_deltas(base):
    """`from_models` with a base that a delta was applied to, without noticing."""
    delta = delta_of(base, 1)
    tuned = delta.apply_(copy.deepcopy(base))
    used = delta_of(base, 2).apply_(copy.deepcopy(base))
    used.classifier = copy.deepcopy(base.classifier)
    found = BiasDelta.from_models(used, tuned)
    assert found.config.base_fingerprint == fingerprint(base, find_biases(base))
    for name in delta:
        torch.testing.assert_close(found[name], delta[name], atol=1e-6, rtol=0)


def test_values_that_are_not_at_hand_are_an_error(base):
    delta = delta_of(base, 1)
    offloaded = copy.deepcopy(base)
    cpu_offload(offloaded, execution_device="cpu")
    empty = copy.deepcopy(base).to("meta")
    for model in (offloaded, empty):
        before = [(name, id(tensor)) for name, tensor in model.named_parameters()]
        with pytest.raises(MergeError, match=r"(?s)bias is on the meta device.*without offloading"):
            delta.apply_(model)
        assert [(name, id(tensor)) for name, tensor in model.named_parameters()] == before


@pytest.mark.parametrize(
    "name",
    ["roberta-sequence", "deberta-sequence", "gpt2-causal_lm", "xlnet-sequence", "vit-image", "whisper-audio", "mlp"],
)
def test_each_kind_of_place_is_compared(name):
    """Slices, free-standing vectors, convolutions: what was written there is known again."""
    arch = ARCHITECTURES[name]
    base = randomize_(arch.build())
    terms = ["query", "value"] if name.startswith("gpt2") else "all"
    first, second = (
        BiasDelta.from_model(fill_(get_peft_model(copy.deepcopy(base), config_for(arch, bias_terms=terms)), seed=seed))
        for seed in (1, 2)
    )
    alone = second.apply_(copy.deepcopy(base))
    model = first.apply_(copy.deepcopy(base))
    model.load_state_dict(base.state_dict())
    second.apply_(model)
    assert same_tensors(base_tensors(model), base_tensors(alone))
    second.remove_(model)
    assert same_tensors(base_tensors(model), base_tensors(base))


def test_a_model_for_another_task_is_named(tmp_path):
    """Its parts are others, which alone would look like another base."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=32, **sizes))
    torch.nn.init.normal_(model.bert.pooler.dense.bias)  # it was trained
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), BitFitConfig())
    BiasDelta.from_model(tuned).save_pretrained(tmp_path / "delta")
    other = AutoModelForTokenClassification.from_pretrained(tmp_path / "base")
    with pytest.raises(
        BaseModelMismatchError,
        match=r"trained in a BertForSequenceClassification .*a BertForTokenClassification .*AutoModelForSequenceClass",
    ):
        load_delta(other, tmp_path / "delta")
