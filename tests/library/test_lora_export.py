"""The stock export: a plain LoRA adapter with which stock libraries compute what the tuned model computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build, randomize_
from hub_deltas import (
    BASE,
    INPUTS,
    STOCK_FILES,
    load_base,
    logits,
    put_base,
    save_base,
    tune,
)
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from tuner_tester import distance, fill_, outputs

from bitfit_hf import (
    BaseModelMismatchError,
    BiasDelta,
    BitFitConfig,
    StockExportError,
    load_delta,
    push_to_hub,
)
from bitfit_hf.delta.lora_export import export_stock

TOLERANCE = 2e-6
# No Linear layer outside of the head; a parameter of the head in no module.
NOT_EXPORTABLE = ("convnet", "whisper-audio-weighted")
EXPORTABLE = [name for name, arch in ARCHITECTURES.items() if not arch.bias_free and name not in NOT_EXPORTABLE]

# One of each kind of bias and head: fused, tied, free-standing, two-layer heads, images, audio, encoder and decoder.
QUICK = (
    "bert-masked_lm",
    "roberta-sequence",
    "deberta-sequence",
    "gpt2-sequence",
    "xlnet-sequence",
    "mamba2-causal_lm",
)
QUICK += ("bart-seq2seq_lm", "vit-image", "whisper-audio", "attention", "torch_encoder")


def tuned(name: str, **values: Any) -> PeftModel:
    return fill_(get_peft_model(randomize_(build(name)), BitFitConfig(**values))).eval()


@pytest.mark.filterwarnings("ignore:.*(target_modules|fan_in_fan_out|tie_word_embeddings|tied)")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in EXPORTABLE])
def test_stock_libraries_compute_what_the_tuned_model_computes(name, tmp_path):
    """Fused, tied and free-standing vectors and heads of every kind, by stock PEFT and by stock transformers."""
    arch = ARCHITECTURES[name]
    model = tuned(name)
    wanted = outputs(model, arch)
    assert distance(wanted, outputs(randomize_(build(name)), arch)) > 1e-4
    export_stock(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    wrapped = PeftModel.from_pretrained(randomize_(build(name)), tmp_path).eval()
    assert wrapped.peft_config["default"].peft_type == "LORA"
    assert distance(wanted, outputs(wrapped, arch)) <= TOLERANCE
    if arch.is_transformers:
        in_place = randomize_(build(name))
        in_place.load_adapter(str(tmp_path))
        assert distance(wanted, outputs(in_place.eval(), arch)) <= TOLERANCE


def test_the_zoo_is_exported_whole():
    assert len(EXPORTABLE) >= 40
    assert set(QUICK) <= set(EXPORTABLE)


@pytest.mark.parametrize("terms", ["query", ["query", "value"], "query+intermediate", "layer 1"])
def test_a_part_of_the_biases(terms, tmp_path):
    """Of a fused vector of which one slice is tuned, the whole is written."""
    narrowed = {"layers_to_transform": 1} if terms == "layer 1" else {"bias_terms": terms}
    arch = ARCHITECTURES["gpt2-sequence"]
    model = tuned("gpt2-sequence", **narrowed)
    export_stock(model, tmp_path)
    loaded = PeftModel.from_pretrained(randomize_(build("gpt2-sequence")), tmp_path).eval()
    assert distance(outputs(model, arch), outputs(loaded, arch)) <= TOLERANCE


def test_the_file_holds_the_tuned_biases_themselves(tmp_path):
    model = tune(randomize_(build("bert-sequence")))
    delta = BiasDelta.from_model(model)
    export_stock(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    base = randomize_(build("bert-sequence"))
    for name, tensor in delta.items():
        places = [f"base_model.model.{name}", f"base_model.model.{name.removesuffix('.bias')}.base_layer.bias"]
        (key,) = [place for place in places if place in stored]
        assert torch.equal(stored.pop(key), base.get_parameter(name) + tensor)
    assert {key for key in stored if "lora_" not in key} == {f"base_model.model.{name}" for name in delta.head}
    lora = {key: tensor for key, tensor in stored.items() if "lora_" in key}
    assert sorted(key.rpartition(".lora_")[2] for key in lora) == ["A.weight", "B.weight"]
    assert sum(tensor.abs().sum() for tensor in lora.values()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base(dtype, tmp_path):
    model = fill_(get_peft_model(randomize_(build("bert-masked_lm")).to(dtype), BitFitConfig())).eval()
    export_stock(model, tmp_path)
    loaded = PeftModel.from_pretrained(randomize_(build("bert-masked_lm")).to(dtype), tmp_path).eval()
    arch = ARCHITECTURES["bert-masked_lm"]
    assert distance(outputs(model, arch), outputs(loaded, arch)) == 0


# --- from a delta alone ---


def test_a_delta_takes_the_base_s_values_from_a_model_or_loads_it(tmp_path):
    folder = save_base(tmp_path / "base")
    model = tune(load_base(str(folder)))
    delta = BiasDelta.from_model(model)
    export_stock(model, tmp_path / "model")
    export_stock(delta, tmp_path / "given", base=load_base(str(folder)))
    export_stock(delta, tmp_path / "named", base=str(folder))
    export_stock(delta, tmp_path / "found")
    written = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("model", "given", "named", "found")
    ]
    assert len(set(written)) == 1


def test_another_base_than_the_delta_s_is_refused(tmp_path):
    model = tune(load_base(str(save_base(tmp_path / "base"))))
    delta = BiasDelta.from_model(model)
    other = load_base(str(save_base(tmp_path / "other", seed=5)))
    with pytest.raises(BaseModelMismatchError, match="tensors differ"):
        export_stock(delta, tmp_path / "out", base=other)
    applied = delta.apply_(load_base(str(tmp_path / "base")))
    with pytest.raises(StockExportError, match="not those of its base"):
        export_stock(delta, tmp_path / "out", base=applied)
    assert not (tmp_path / "out").exists()


def test_a_base_that_cannot_be_loaded(tmp_path):
    delta = BiasDelta.from_model(tune(load_base(str(save_base(tmp_path / "base")))))
    with pytest.raises(StockExportError, match="pass it as `base=`"):
        export_stock(delta, tmp_path / "out", base=str(tmp_path / "nowhere"))
    plain = BiasDelta.from_model(fill_(get_peft_model(randomize_(build("mlp")), BitFitConfig())))
    with pytest.raises(StockExportError, match="pass it as `base=`"):
        export_stock(plain, tmp_path / "out")
    export_stock(plain, tmp_path / "out", base=randomize_(build("mlp")))
    assert (tmp_path / "out" / "adapter_config.json").exists()


# --- what stock PEFT cannot represent ---


def test_added_biases_are_refused_with_the_reason(tmp_path):
    model = tuned("llama-causal_lm", add_missing_biases=True)
    for source in (model, BiasDelta.from_model(model)):
        with pytest.raises(StockExportError, match="biases to layers that have none in the base"):
            export_stock(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_place_for_lora_is_refused(tmp_path):
    with pytest.raises(StockExportError, match="no Linear layer outside its head"):
        export_stock(tuned("convnet"), tmp_path)


def test_merged_adapters_are_refused(tmp_path):
    model = tuned("bert-sequence")
    model.merge_adapter()
    with pytest.raises(StockExportError, match="unmerge_adapter"):
        export_stock(model, tmp_path)
    model.unmerge_adapter()
    export_stock(model, tmp_path)


def test_a_head_whose_name_ends_like_a_module_of_the_backbone_is_refused(tmp_path):
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"pre_score": nn.Linear(4, 4), "mix": nn.Linear(4, 4)})
            self.score = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.score(self.body["mix"](self.body["pre_score"](x)))

    model = get_peft_model(Scorer(), BitFitConfig(modules_to_save=["score"]))
    assert model.peft_config["default"].modules_to_save == ["score"]
    with pytest.raises(StockExportError, match=r"goes by how paths end.*\n  - body\.pre_score"):
        export_stock(model, tmp_path)


# --- without bitfit_hf ---

# `None` among the loaded modules makes every import of that name fail.
WITHOUT_US = """
import sys
sys.modules["bitfit_hf"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

torch.set_num_threads(1)
repo, base, inputs, out = sys.argv[1:]
stock = {"adapter_kwargs": {"subfolder": "stock"}}
models = {
    "by name": AutoModelForSequenceClassification.from_pretrained(repo, num_labels=4, **stock),
    "PeftModel": PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=4), repo, subfolder="stock"
    ),
}
in_place = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
in_place.load_adapter(repo, **stock)
models["load_adapter"] = in_place
with torch.no_grad():
    save_file({name: model.eval()(**load_file(inputs)).logits.clone() for name, model in models.items()}, out)
try:
    AutoModelForSequenceClassification.from_pretrained(repo)
except KeyError as error:
    assert "BITFIT" in str(error)
else:
    raise AssertionError("the delta itself needs bitfit_hf")
assert not [name for name in sys.modules if name.startswith("bitfit_hf.")]
"""


def test_stock_loads_from_the_hub_where_bitfit_hf_cannot_be_imported(hub, hub_env, tmp_path):
    from safetensors.torch import save_file

    put_base(hub)
    model = tune(load_base())
    push_to_hub(model, "alice/tuned", stock=True)
    assert set(hub.files("alice/tuned")) >= STOCK_FILES
    assert json.loads(hub.files("alice/tuned")["stock/adapter_config.json"])["revision"] == hub.commits(BASE)[0].oid
    save_file(INPUTS, tmp_path / "inputs.safetensors")
    out = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", WITHOUT_US, "alice/tuned", BASE, str(tmp_path / "inputs.safetensors"), str(out)]
    subprocess.run(command, env=hub_env.environ, check=True, timeout=300, cwd=tmp_path)
    found = load_file(out)
    assert set(found) == {"by name", "PeftModel", "load_adapter"}
    if Version(transformers.__version__) < Version("5.18"):
        del found["by name"], found["load_adapter"]  # both answer with an untuned model
    for way, tensor in found.items():
        assert (tensor - logits(model)).abs().max() <= TOLERANCE, way


MERGED = """
import sys
sys.modules["bitfit_hf"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

torch.set_num_threads(1)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(**load_file(sys.argv[2])).logits.clone()
assert model.config.id2label[3] == "certainly"
save_file({"logits": logits}, sys.argv[3])
"""


@pytest.mark.parametrize("way", ["merge_and_unload", pytest.param("load_delta", marks=pytest.mark.slow)])
def test_a_merged_checkpoint_loads_where_bitfit_hf_cannot_be_imported(way, tmp_path):
    from safetensors.torch import save_file

    folder = save_base(tmp_path / "base")
    model = tune(load_base(str(folder)))
    wanted = logits(model)
    if way == "load_delta":
        BiasDelta.from_model(model).save_pretrained(tmp_path / "delta")
        merged = load_delta(AutoModelForSequenceClassification.from_pretrained(folder), tmp_path / "delta")
    else:
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    save_file(INPUTS, tmp_path / "inputs.safetensors")
    arguments = [str(tmp_path / name) for name in ("merged", "inputs.safetensors", "logits.safetensors")]
    subprocess.run([sys.executable, "-c", MERGED, *arguments], check=True, timeout=300, cwd=Path(tmp_path))
    assert (load_file(tmp_path / "logits.safetensors")["logits"] - wanted).abs().max() <= TOLERANCE


def test_the_push_of_a_delta_loads_the_base_for_the_export(hub, hub_env, monkeypatch):
    monkeypatch.setattr("bitfit_hf.hub.contents.draw_change", lambda delta, folder: None)
    put_base(hub)
    model = tune(load_base())
    push_to_hub(model, "alice/one", stock=True)
    push_to_hub(BiasDelta.from_model(model), "alice/two", stock=True)
    for name in STOCK_FILES:
        assert hub.files("alice/one")[name] == hub.files("alice/two")[name]
