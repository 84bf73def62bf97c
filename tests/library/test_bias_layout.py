"""What `adapter_config.json` says of each tensor: plain JSON, also where development versions had strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES, build
from peft import get_peft_model

from bitfit_hf import BiasDelta, BitFitConfig, DeltaFormatError, DeltaMismatchError
from bitfit_hf.storage.bias_layout import decode_layout, encode_layout, plain_layout
from bitfit_hf.terms import Bias, find_biases

OLD = Path(__file__).parent / "regression" / "0.1.0.dev0" / "delta"


def by_place(biases: list[Bias]) -> list[Bias]:
    return sorted(biases, key=lambda bias: (bias.name, bias.spans))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_biases_of_every_architecture_come_back(name):
    biases = find_biases(build(name), add_missing_biases=True)
    layout = json.loads(json.dumps(encode_layout(biases), sort_keys=True))
    assert by_place(decode_layout(layout)) == by_place(biases)


def test_a_place_is_plain_json():
    model = build("bert-sequence")
    layout = encode_layout(find_biases(model))
    assert layout["bert.encoder.layer.1.attention.self.key.bias"] == {"term": "key", "layer": 1, "shape": [32]}
    assert layout["bert.pooler.dense.bias"] == {"term": "pooler", "shape": [32]}
    fused = encode_layout(bias for bias in find_biases(build("gpt2-causal_lm")) if bias.term in ("query", "value"))
    assert fused["transformer.h.0.attn.c_attn.bias"] == {
        "layer": 0,
        "shape": [96],
        "terms": {"query": [[0, 32]], "value": [[64, 96]]},
    }
    seq2seq = encode_layout(find_biases(build("bart-seq2seq_lm")))
    assert {place.get("stack") for place in seq2seq.values()} >= {"encoder", "decoder"}
    tied = Bias("a", "bias", "other", None, "", (3,), ((0, 3),), exists=False, aliases=("b.bias",))
    assert encode_layout([tied]) == {"a.bias": {"term": "other", "shape": [3], "added": True, "tied": ["b.bias"]}}
    assert decode_layout(encode_layout([tied])) == [tied]


@pytest.mark.parametrize("way", ["stock", "ours"])
def test_a_tensor_takes_one_line_of_each_table(way, tmp_path):
    tuned = get_peft_model(build("bert-sequence"), BitFitConfig())
    if way == "stock":
        tuned.save_pretrained(tmp_path)
    else:
        BiasDelta.from_model(tuned).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    lines = text.splitlines()
    for table, number in ((config["bias_layout"], 18), (config["base_fingerprint"]["tensors"], 36)):
        assert len(table) == number
        for name, value in table.items():
            found = [
                line for line in lines if line.strip().startswith(f'"{name}": {{') and line.rstrip(",")[-1] == "}"
            ]
            assert any(json.loads("{" + line.strip().rstrip(",") + "}") == {name: value} for line in found), name
    assert len(lines) < len(config) + 18 + 36 + 20
    assert list(config) == sorted(config)


def test_the_strings_of_development_versions_say_the_same(tmp_path):
    old = json.loads((OLD / "adapter_config.json").read_text())["bias_layout"]
    assert all(isinstance(text, str) for text in old.values())
    plain = plain_layout(old)
    assert by_place(decode_layout(plain)) == by_place(decode_layout(old))
    assert plain["bert.encoder.layer.0.intermediate.dense.bias"] == {"term": "intermediate", "layer": 0, "shape": [12]}
    config = BitFitConfig(bias_layout=old)
    assert config.bias_layout == plain
    BiasDelta.from_pretrained(OLD).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias_layout"] == plain
    strings = {
        "a.bias": "query 3 - 96 0:32; value 3 - 96 64:96",
        "b.bias": "other - text.encoder 4x8+",
        "c.bias": "key 0 decoder 9 0:2,3:5",
    }
    assert plain_layout(strings) == {
        "a.bias": {"layer": 3, "shape": [96], "terms": {"query": [[0, 32]], "value": [[64, 96]]}},
        "b.bias": {"term": "other", "stack": "text.encoder", "shape": [4, 8], "added": True},
        "c.bias": {"layer": 0, "stack": "decoder", "shape": [9], "terms": {"key": [[0, 2], [3, 5]]}},
    }


GOOD = {"term": "query", "layer": 0, "shape": [32]}
DAMAGED: list[Any] = [
    "",
    "query",
    "mood 0 - 32",
    "query 0 - 32 0",
    "query 0 - 32 0:40",
    "query 0 - 32 0:16; key 0 - 32",
    "query 0 - 32 0:16; key 1 - 32 16:32",
    {},
    {"term": "query"},
    {"shape": [32]},
    GOOD | {"term": "mood"},
    GOOD | {"term": ["query"]},
    *(GOOD | {"shape": shape} for shape in (32, [], [32.0], [True], ["32"], [-1], [10**12], [1, 2, 3], None)),
    *(GOOD | {"layer": layer} for layer in (-1, "0", 1.5, True, [0])),
    *(GOOD | {"stack": stack} for stack in (3, None, ["encoder"])),
    *(GOOD | {"added": added} for added in (1, "yes", None)),
    *(GOOD | {"tied": tied} for tied in (3, [1], None)),
    *(
        {"shape": [32], "terms": terms}
        for terms in (
            *(None, [], {}, "query", {"mood": [[0, 1]]}, {"query": None}, {"query": []}, {"query": [0, 1]}),
            *({"query": [[0, 33]]}, {"query": [[4, 4]]}, {"query": [[-1, 4]]}, {"query": [[0, 1, 2]]}),
            *({"query": [["0", "1"]]}, {"query": [[0, 4], [2, 6]]}, {"query": [[0, 4]], "key": [[3, 8]]}),
        )
    ),
]


@pytest.mark.parametrize("place", DAMAGED, ids=str)
def test_a_damaged_place_is_one_of_our_errors(place):
    for read in (decode_layout, lambda layout: BitFitConfig(bias_layout=layout, add_missing_biases=True)):
        with pytest.raises(DeltaFormatError, match=r"`bias_layout` .*'a\.bias'.*fetch the delta again"):
            read({"a.bias": place})


def test_a_tied_bias_may_be_chosen_by_any_of_its_names(tmp_path):
    """`target_modules` can name the other module, of which the file has no tensor."""
    tied = Bias("first", "bias", "other", None, "", (3,), ((0, 3),), aliases=("last.bias",))
    layout = encode_layout([tied])
    for names in (["first"], ["last"], "la.*"):
        BitFitConfig(bias_layout=layout, target_modules=names)
    with pytest.raises(DeltaMismatchError, match="target_modules"):
        BitFitConfig(bias_layout=layout, target_modules=["other"])
    with pytest.raises(DeltaMismatchError, match="exclude_modules"):
        BitFitConfig(bias_layout=layout, exclude_modules=["last"])
