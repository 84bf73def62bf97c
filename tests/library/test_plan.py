"""Layers that a checkpoint does not have: their random weights must not be lost, or mistaken for the base's."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, build, randomize_
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from bitfit_hf import BitFitConfig, load_delta


@pytest.fixture
def without_pooler(tmp_path):
    """A checkpoint of a masked language model, which has no pooler."""
    folder = tmp_path / "base"
    randomize_(build("bert-masked_lm")).save_pretrained(folder)
    return folder


def train_(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_a_new_pooler_is_trained_and_saved_with_the_head(without_pooler, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(without_pooler, num_labels=3)
    tuned = train_(get_peft_model(base, BitFitConfig()))
    config = tuned.peft_config["default"]
    assert config.modules_to_save == ["bert.pooler.dense", "classifier"]
    assert not any("pooler" in name for name in [*config.bias_layout, *config.base_fingerprint["tensors"]])
    tuned.save_pretrained(tmp_path / "delta")

    inputs = ARCHITECTURES["bert-sequence"].inputs()
    with torch.no_grad():
        wanted = tuned(**inputs).logits
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta").eval()
        torch.testing.assert_close(loaded(**inputs).logits, wanted, atol=2e-6, rtol=0)
        stock = AutoModelForSequenceClassification.from_pretrained(without_pooler).eval()
        load_delta(stock, tmp_path / "delta")
        torch.testing.assert_close(stock(**inputs).logits, wanted, atol=2e-6, rtol=0)


def test_a_new_pooler_of_a_bare_backbone_is_left_alone(without_pooler, tmp_path):
    tuned = train_(get_peft_model(AutoModel.from_pretrained(without_pooler), BitFitConfig()))
    config = tuned.peft_config["default"]
    assert config.modules_to_save is None
    assert not any("pooler" in name for name in config.bias_layout)
    tuned.save_pretrained(tmp_path / "delta")
    inputs = ARCHITECTURES["bert-sequence"].inputs()
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(without_pooler), tmp_path / "delta").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            again(**inputs).last_hidden_state, tuned(**inputs).last_hidden_state, atol=2e-6, rtol=0
        )


def test_a_pooler_that_the_checkpoint_has_stays_frozen(tmp_path):
    randomize_(build("bert-backbone")).save_pretrained(tmp_path)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path), BitFitConfig())
    config = model.peft_config["default"]
    assert config.modules_to_save == ["classifier"]
    assert config.bias_layout["bert.pooler.dense.bias"]["term"] == "pooler"


def test_a_model_that_was_not_loaded_is_taken_as_it_is():
    model = get_peft_model(build("bert-sequence"), BitFitConfig())
    assert model.peft_config["default"].modules_to_save == ["classifier"]
