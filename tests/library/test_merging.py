"""Merging for good, whichever way the adapters have got into the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer_tester import WAYS, fresh, prepared, rows, trainer_for
from transformers import AutoModelForSequenceClassification
from tuner_tester import state

from bitfit_hf import merge_and_unload
from bitfit_hf.errors import AdapterNameError, MergeError


@pytest.mark.parametrize("way", WAYS)
def test_a_trained_model_becomes_a_stock_checkpoint(way: str, tmp_path: Path):
    model = prepared(way)
    trainer_for(model, tmp_path / "run").train()
    batch = {key: value.unsqueeze(0) for key, value in rows(1)[0].items()}
    model.eval()
    before = model(**batch).logits
    assert not torch.equal(before, fresh().eval()(**batch).logits)
    merged = merge_and_unload(model, safe_merge=True)
    assert type(merged) is type(fresh())
    assert list(merged.state_dict()) == list(fresh().state_dict())
    assert torch.equal(merged(**batch).logits, before)
    merged.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**batch).logits, before, rtol=0, atol=2e-6)


def test_only_what_is_named_is_merged(tmp_path: Path):
    model = prepared("wrapped")
    trainer_for(model, tmp_path).train()
    before = state(model)
    with pytest.raises(AdapterNameError, match=r"no adapters \['other'\]; the model has \['default'\]"):
        merge_and_unload(model, adapter_names=["other"])
    assert state(model) == before


def test_a_model_without_an_adapter(tmp_path: Path):
    model = fresh()
    with pytest.raises(MergeError, match=r"has no BitFit adapter.*load_delta"):
        merge_and_unload(model)
