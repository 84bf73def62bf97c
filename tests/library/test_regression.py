"""Deltas saved by earlier releases load to the same outputs in this one.

`tests/library/regression/<version>/` holds a tiny base, a delta on it, and what the tuned model answers. To save one
for a release: `python tests/library/test_regression.py` in a checkout of it, and commit the new folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import bitfit_hf
from bitfit_hf import BiasDelta, BitFitConfig, load_delta

FOLDER = Path(__file__).parent / "regression"
RELEASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
INPUTS = {
    "input_ids": torch.tensor([[2, 5, 7, 3], [2, 11, 3, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1] * 3 + [0]]),
}
LABELS = {0: "no", 1: "perhaps", 2: "yes"}


def load_in_place(folder: Path) -> torch.nn.Module:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    model.load_adapter(str(folder / "delta"))
    return model


WAYS = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(folder / "base"), folder / "delta"
    ),
    "load_adapter": load_in_place,
    "load_delta": lambda folder: load_delta(
        AutoModelForSequenceClassification.from_pretrained(folder / "base"), folder / "delta"
    ),
}


def test_there_is_a_release_to_compare_with():
    assert RELEASES


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("way", WAYS)
def test_an_old_delta_gives_its_old_answers(release, way):
    folder = FOLDER / release
    expected = json.loads((folder / "expected.json").read_text())
    model = WAYS[way](folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**INPUTS).logits, torch.tensor(expected["logits"]), atol=2e-6, rtol=0)
    assert model.config.id2label == LABELS
    assert BiasDelta.from_pretrained(folder / "delta").digest == expected["digest"]


def save(folder: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3, id2label=LABELS)
    base.name_or_path = "tests/regression-base"
    model = get_peft_model(base, BitFitConfig(base_model_name_or_path="tests/regression-base"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        delta = BiasDelta.from_model(model)
        delta.save_pretrained(folder / "delta")
        logits = model.eval()(**INPUTS).logits
    expected = {"logits": logits.tolist(), "digest": delta.digest}
    (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    save(FOLDER / bitfit_hf.__version__)
