"""The README's Python runs as it stands, but for whose the repos are, against the loopback Hub and a tiny base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, Pipeline, pipeline

from bitfit_hf import BiasDelta, BitFitConfig, load_delta

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
README = README.replace('"bert-base-uncased"', '"alice/bert-base-uncased"').replace('"user/', '"alice/')
TRAIN, PUSH, LOAD, SERVE = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
BASE = "alice/bert-base-uncased"


@pytest.fixture
def workplace(study_base: str, hub_env: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and the base on the Hub."""
    AutoModel.from_pretrained(study_base).push_to_hub(BASE)
    AutoTokenizer.from_pretrained(study_base).push_to_hub(BASE)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def rows() -> list[dict[str, Any]]:
    ids = torch.randint(1000, 2000, (8, 5), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids[i], "labels": i % 3} for i in range(8)]


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "README.md", "exec"), names)  # our own file
    return names


def test_training_sharing_and_every_way_of_loading(workplace: Path) -> None:
    trained = run(TRAIN, train_dataset=rows(), eval_dataset=rows())
    model, tuned = trained["model"], trained["tuned"]
    assert {path.name for path in (workplace / "my-task").glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    ids = torch.stack([row["input_ids"] for row in rows()])
    expected = model.eval()(ids).logits
    assert torch.allclose(tuned(ids).logits, expected, atol=1e-6)

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    run(PUSH, model=model, tokenizer=tokenizer)
    names = {
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "AutoPeftModelForSequenceClassification": AutoPeftModelForSequenceClassification,
        "PeftModel": PeftModel,
        "load_delta": load_delta,
        "pipeline": pipeline,
    }
    ways = LOAD.splitlines()
    assert len(ways) == 6
    for way in ways:
        base = AutoModelForSequenceClassification.from_pretrained(BASE)
        loaded = eval(way.partition("  #")[0], {**names, "base": base})
        if "(base" in way or "base." in way:  # these change the model that they are given
            loaded = base
        elif isinstance(loaded, Pipeline):
            loaded = loaded.model
        assert torch.allclose(loaded.eval()(ids).logits, expected, atol=1e-6), way


def test_serving(workplace: Path) -> None:
    for name, labels in (("stance", 3), ("intent", 6)):
        tuned = get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=labels), BitFitConfig()
        )
        BiasDelta.from_model(tuned).save_pretrained(workplace / "outputs" / "quickstart" / name)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    encoded = tokenizer(["not bad at all", "please cancel my order"], padding=True, return_tensors="pt")
    base_model = AutoModel.from_pretrained(BASE)
    out = run(SERVE, base_model=base_model, tokenizer=tokenizer, encoded=encoded)["out"]
    assert out[0].logits.shape == (3,)
    assert torch.allclose(out[1].last_hidden_state, base_model.eval()(**encoded).last_hidden_state[1], atol=1e-6)
