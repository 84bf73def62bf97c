"""The contributions to other projects: their Python is run, against the loopback Hub and a tiny base."""

from __future__ import annotations

import re

import pytest
import torch
from docs_scripts import DOCS, python_of, script
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from bitfit_hf import BitFitConfig, push_to_hub

UPSTREAM = DOCS / "upstream"
BASE, DELTA = "user/tiny-base", "user/minilm-mood"
LABELS = {0: "bad", 1: "good"}


@pytest.fixture
def pushed(study_base, hub, hub_env):
    """A delta on the Hub, and the model that it was taken from."""
    hub.create_user("user")
    hub_env.login("user")
    AutoModel.from_pretrained(study_base).push_to_hub(BASE)
    AutoTokenizer.from_pretrained(study_base).push_to_hub(BASE)
    base = AutoModelForSequenceClassification.from_pretrained(BASE, id2label=LABELS)
    model = get_peft_model(base, BitFitConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    push_to_hub(model, DELTA, tokenizer=AutoTokenizer.from_pretrained(BASE))
    return model.eval()


def scores(model, *texts):
    tokens = AutoTokenizer.from_pretrained(BASE)(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).logits.softmax(-1)


def test_the_hubs_snippets_run(pushed):
    page = (UPSTREAM / "huggingface_js" / "README.md").read_text(encoding="utf-8")
    page = page.replace("sentence-transformers/all-MiniLM-L6-v2", BASE)
    first, second = python_of(page)
    names: dict[str, object] = {}
    exec(first, names)  # our own file
    answer = names["pipe"]("A text.")[0]
    assert answer["score"] == pytest.approx(float(scores(pushed, "A text.").max()), abs=1e-5)
    assert answer["label"] in LABELS.values()
    exec(second, names)
    torch.testing.assert_close(scores(names["model"].eval(), "A text."), scores(pushed, "A text."))


def test_the_typescript_prints_what_the_page_shows():
    source = (UPSTREAM / "huggingface_js" / "snippet.ts").read_text(encoding="utf-8")
    page = (UPSTREAM / "huggingface_js" / "README.md").read_text(encoding="utf-8")
    filled = {
        "${model.pipeline_tag}": "text-classification",
        "${model.id}": "user/minilm-mood",
        "${autoClass}": "AutoModelForSequenceClassification",
        '${base ?? "fill-in-base-model"}': "sentence-transformers/all-MiniLM-L6-v2",
    }
    for place, value in filled.items():
        assert place in source
        source = source.replace(place, value)
    printed = re.findall(r"snippets\.push\(`(.*?)`\);", source, re.S)
    assert [f"{text}\n" for text in printed] == python_of(page)


def test_an_endpoint_answers_for_its_delta_and_for_others(pushed, hub_env, tmp_path, monkeypatch):
    from huggingface_hub import snapshot_download

    handler = script("upstream/inference_endpoints/handler")
    monkeypatch.setenv("BITFIT_TASKS", f"other={DELTA}")
    endpoint = handler.EndpointHandler(snapshot_download(DELTA))

    expected = scores(pushed, "One.", "Another text.")
    (answer,) = endpoint({"inputs": "One."})
    assert [row["label"] for row in answer] == [LABELS[int(i)] for i in expected[0].argsort(descending=True)]
    assert answer[0]["score"] == pytest.approx(float(expected[0].max()), abs=1e-5)
    answers = endpoint({"inputs": ["One.", "Another text."], "task": ["default", "other"]})
    assert [answer[0]["score"] for answer in answers] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-5)
    assert len(endpoint({"inputs": [["One.", "A pair."]]})) == 1


@pytest.mark.parametrize("folder", sorted((UPSTREAM / "peft_method_comparison" / "experiments" / "bitfit").iterdir()))
def test_pefts_comparison_can_train_with_its_experiments(folder):
    config = PeftConfig.from_pretrained(str(folder))
    sizes = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(sizes), config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("bitfit_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    ids = torch.arange(12).reshape(2, 6)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(parameter.abs().max() > 0 for name, parameter in trained.items() if "k_proj" not in name)


def test_there_are_two_experiments():
    assert len(list((UPSTREAM / "peft_method_comparison" / "experiments").rglob("training_params.json"))) == 2
