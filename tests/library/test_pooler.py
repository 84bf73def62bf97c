"""A pooler that was never trained is a part of the head: found by its values, trained whole, and in every file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from tuner_tester import fill_

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig, ConfigError, TaskBank, load_delta
from bitfit_hf.delta.lora_export import export_stock
from bitfit_hf.terms import find_biases, head_modules, select_biases, untrained_pooler

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
POOLER = "bert.pooler.dense"
INPUTS = {"input_ids": torch.tensor([[2, 5, 6, 7], [2, 8, 9, 3], [2, 11, 12, 3]])}


def encoder(trained_pooler: bool = False) -> BertForSequenceClassification:
    """As a checkpoint of a sentence encoder leaves it: all biases trained, the pooler's at zero."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "classifier" not in name and ("pooler" not in name or trained_pooler):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder's backbone, saved with its untrained pooler."""
    folder = tmp_path_factory.mktemp("base")
    encoder().bert.save_pretrained(folder)
    return folder


def load_base(base: Path, **kwargs) -> BertForSequenceClassification:
    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, **kwargs).eval()


@pytest.fixture(scope="module")
def delta(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("delta")
    fill_(get_peft_model(load_base(base), BitFitConfig())).save_pretrained(folder)
    return folder


def test_only_a_pooler_at_exactly_zero_was_never_trained():
    assert untrained_pooler(encoder()) == [POOLER]
    assert untrained_pooler(encoder(trained_pooler=True)) == []
    nearly = encoder()
    with torch.no_grad():
        nearly.bert.pooler.dense.bias[-1] = 1e-30
    assert untrained_pooler(nearly) == []


def test_values_that_cannot_be_read_count_as_trained():
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(**SIZES))
    assert untrained_pooler(model) == []
    assert sum(bias.num_parameters for bias in find_biases(model) if bias.term == "pooler") == 16


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: BertModel(BertConfig(**SIZES)), id="a backbone has no head"),
        pytest.param(lambda: BertForMaskedLM(BertConfig(**SIZES)), id="no pooler"),
        pytest.param(lambda: BertForTokenClassification(BertConfig(**SIZES)), id="tokens are classified"),
        pytest.param(lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)), id="a head of its own"),
    ],
)
def test_where_no_pooler_is_in_front_of_a_new_head(model):
    assert untrained_pooler(model()) == []


def test_head_and_biases_by_the_one_rule():
    model = encoder()
    assert head_modules(model) == [POOLER, "classifier"]
    names = {bias.name for bias in select_biases(model)}
    assert names == {bias.name for bias in find_biases(model)}
    everything = {bias.name for bias in select_biases(model, with_untrained_pooler=False)}
    assert everything - names == {f"{POOLER}.bias"}
    subset = get_peft_model(model, BitFitConfig(bias_terms="query+intermediate"))
    assert list(subset.peft_config["default"].modules_to_save) == [POOLER, "classifier"]


def test_a_trained_pooler_is_treated_as_before():
    model = get_peft_model(encoder(trained_pooler=True), BitFitConfig())
    config = model.peft_config["default"]
    assert list(config.modules_to_save) == ["classifier"]
    assert f"{POOLER}.bias" in BiasDelta.from_model(model)
    assert not model.base_model.model.bert.pooler.dense.base_layer.weight.requires_grad


@pytest.mark.parametrize("choice", [{"train_untrained_pooler": False}, {"exclude_modules": ["pooler.dense"]}])
def test_it_can_be_left_frozen(base: Path, tmp_path: Path, choice):
    model = fill_(get_peft_model(load_base(base), BitFitConfig(**choice)))
    assert list(model.peft_config["default"].modules_to_save) == ["classifier"]
    model.save_pretrained(tmp_path)
    assert not any("pooler.dense.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(load_base(base), tmp_path).eval()
    torch.testing.assert_close(loaded(**INPUTS).logits, model(**INPUTS).logits, rtol=0, atol=2e-6)


def test_a_pooler_that_the_checkpoint_lacks_cannot_be_left_frozen(tmp_path: Path):
    """Another process would make another one."""
    torch.manual_seed(0)
    BertForTokenClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"bert\.pooler\.dense is not in the checkpoint"):
        get_peft_model(model, BitFitConfig(train_untrained_pooler=False))
    assert head_modules(model) == [POOLER, "classifier"]
    get_peft_model(model, BitFitConfig())


def test_the_file_holds_it_whole(delta: Path):
    tensors = load_file(delta / "adapter_model.safetensors")
    pooler = {key: list(tensor.shape) for key, tensor in tensors.items() if "pooler" in key}
    assert pooler == {f"base_model.model.{POOLER}.weight": [16, 16], f"base_model.model.{POOLER}.bias": [16]}
    config = json.loads((delta / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [POOLER, "classifier"]
    assert not any("pooler" in name for name in config["bias_layout"])


def in_place(base: Path, delta: Path) -> torch.nn.Module:
    model = load_base(base)
    model.load_adapter(str(delta))
    return model


def merged(base: Path, delta: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(load_base(base), delta).merge_and_unload()


LOADINGS = {
    "PeftModel": lambda base, delta: PeftModel.from_pretrained(load_base(base), delta),
    "AutoPeft": lambda base, delta: AutoPeftModelForSequenceClassification.from_pretrained(delta),
    "AutoModel": lambda base, delta: AutoModelForSequenceClassification.from_pretrained(delta),
    "load_adapter": in_place,
    "load_delta": lambda base, delta: load_delta(load_base(base), str(delta)),
    "merged": merged,
}


@pytest.mark.parametrize("way", LOADINGS)
def test_every_way_of_loading_gives_the_tuned_model(base: Path, delta: Path, way: str):
    model = fill_(get_peft_model(load_base(base), BitFitConfig())).eval()
    loaded = LOADINGS[way](base, delta).eval()
    expected = model(**INPUTS).logits
    torch.testing.assert_close(loaded(**INPUTS).logits, expected, rtol=0, atol=2e-6)
    assert (expected - load_base(base)(**INPUTS).logits).abs().max() > 0.01


def test_applying_and_removing_leaves_the_base_as_it_was(base: Path, delta: Path):
    model = load_base(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = BiasDelta.from_pretrained(delta)
    loaded.apply_(model)
    assert not torch.equal(model.bert.pooler.dense.weight, before[f"{POOLER}.weight"])
    loaded.remove_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_stock_export_loads_without_the_plug_in(base: Path, delta: Path, tmp_path: Path):
    export_stock(BiasDelta.from_pretrained(delta), tmp_path, base=load_base(base))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(load_base(base), tmp_path).eval()
    expected = PeftModel.from_pretrained(load_base(base), delta).eval()(**INPUTS).logits
    torch.testing.assert_close(loaded(**INPUTS).logits, expected, rtol=0, atol=2e-6)


def test_a_bank_serves_it_beside_a_task_with_the_frozen_one(base: Path, delta: Path, tmp_path: Path):
    frozen = fill_(get_peft_model(load_base(base), BitFitConfig(train_untrained_pooler=False)), seed=5).eval()
    frozen.save_pretrained(tmp_path)
    own = PeftModel.from_pretrained(load_base(base), delta).eval()
    backbone = BertModel.from_pretrained(base)
    bank = TaskBank(backbone)
    bank.add_task("own", str(delta))
    bank.add_task("frozen", str(tmp_path))
    calls = []
    bank._base.backbone.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    answers = bank(**INPUTS, tasks=["own", "frozen", "own"]).logits
    for i, model in enumerate((own, frozen, own)):
        expected = model(**INPUTS).logits[i]
        torch.testing.assert_close(answers[i], expected, rtol=0, atol=1e-5)
    assert calls == [1]  # the backbone once for both kinds


def test_extracting_from_two_checkpoints(base: Path, delta: Path):
    """As other BitFit code saves them, with the pooler trained whole or its bias alone."""
    model = load_base(base)
    whole = BiasDelta.from_models(model, merged(base, delta))
    assert set(whole.head) == {f"{POOLER}.weight", f"{POOLER}.bias", "classifier.weight", "classifier.bias"}
    assert f"{POOLER}.bias" not in whole
    other = load_base(base)
    with torch.no_grad():
        other.bert.pooler.dense.bias += 0.5
    alone = BiasDelta.from_models(model, other)
    assert set(alone.head) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(alone[f"{POOLER}.bias"], torch.full((16,), 0.5))


def test_a_trainer_trains_it_with_the_head(base: Path, tmp_path: Path, caplog):
    model = load_base(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"input_ids": INPUTS["input_ids"][i % 3], "labels": i % 3} for i in range(12)]
    args = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[BitFitCallback()])
    with caplog.at_level("INFO", logger="bitfit_hf"):
        trainer.train()
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert {tuple(p.shape) for p in groups["head"]["params"]} == {(16, 16), (3, 16)}
    assert f"with the pooler {POOLER}, never trained before" in caplog.text
    wrapper = model.bert.pooler.dense
    assert not torch.equal(wrapper.modules_to_save["default"].weight, before[f"{POOLER}.weight"])
    assert torch.equal(wrapper.original_module.weight, before[f"{POOLER}.weight"])
    trainer.save_model(str(tmp_path / "out"))
    assert "pooler" in (tmp_path / "out" / "README.md").read_text()


def test_token_classification_on_the_same_base_is_left_alone(base: Path):
    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=3)
    assert list(get_peft_model(model, BitFitConfig()).peft_config["default"].modules_to_save) == ["classifier"]


def test_a_task_without_a_new_head_has_no_pooler_in_it():
    model = get_peft_model(encoder(), BitFitConfig(task_type="FEATURE_EXTRACTION"))
    assert not model.peft_config["default"].modules_to_save
    assert f"{POOLER}.bias" in BiasDelta.from_model(model)
