"""Decoders: biases that a model has (Qwen2), biases added to one that has none (Llama, T5), merging, generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, HEADS, HIDDEN, INTERMEDIATE, VOCAB, Architecture, randomize_
from peft import PeftModel, get_peft_model
from torch import nn
from trainer_tester import fresh, losses, moved, rows, trainer_for, tuned
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from tuner_tester import (
    base_tensors,
    config_for,
    distance,
    file_tensors,
    fill_,
    identical,
    outputs,
    same_tensors,
    state,
    tune,
)

from bitfit_hf import AdapterNameError, BitFitCallback, BitFitConfig, MergeError

ADDED = {"add_missing_biases": True}
CASES = [("qwen2-causal_lm", {}), ("qwen2-causal_lm", ADDED), ("llama-causal_lm", ADDED), ("t5-seq2seq_lm", ADDED)]


def settings(case: tuple[str, dict[str, Any]]) -> str:
    return case[0] + ("-added" if case[1] else "")


CASE = pytest.mark.parametrize("case", CASES, ids=settings)


def train(name: str, folder: Path, **values: Any) -> tuple[PeftModel, list[float]]:
    """A randomized model of the zoo, wrapped and trained for some steps, and the loss of each."""
    model = get_peft_model(fresh(name), BitFitConfig(**values))
    data = rows(8, name)
    trainer = trainer_for(
        model, folder, BitFitCallback(), train=data, max_steps=8, per_device_train_batch_size=8, learning_rate=2e-2
    )
    trainer.train()
    return model.eval(), losses(trainer)


# Which biases, and from where they start -----------------------------------------------------------------------------


def test_qwen2_has_the_biases_of_query_key_and_value() -> None:
    found = {name.rsplit(".", 2)[-2] for name in file_tensors(tune(ARCHITECTURES["qwen2-causal_lm"]))}
    assert found == {"q_proj", "k_proj", "v_proj"}
    every = file_tensors(tune(ARCHITECTURES["qwen2-causal_lm"], **ADDED))
    assert {name.rsplit(".", 2)[-2] for name in every} == found | {"o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(every) == 2 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@CASE
def test_a_fresh_adapter_changes_no_bit(case: tuple[str, dict[str, Any]], dtype: torch.dtype) -> None:
    name, values = case
    arch = ARCHITECTURES[name]
    stock = randomize_(arch.build()).to(dtype).requires_grad_(False)
    before, tokens = outputs(stock, arch), generate(stock, arch)
    model = get_peft_model(stock, BitFitConfig(**values))
    assert identical(outputs(model, arch), before)
    assert torch.equal(generate(model, arch), tokens)
    fill_(model)
    assert distance(outputs(model, arch), before) > 1e-3


def test_key_biases_count_where_positions_rotate(tmp_path: Path) -> None:
    """Softmax ignores a constant added to all keys' scores, but a rotated bias is another one at every position."""
    reach = {}
    for name in ("qwen2-causal_lm", "gpt2-causal_lm"):
        arch = ARCHITECTURES[name]
        model = get_peft_model(fresh(name), BitFitConfig(bias_terms="key"))
        model(**arch.inputs(), **arch.labels()).loss.backward()
        reach[name] = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert reach["qwen2-causal_lm"] > 1e-4
    assert reach["gpt2-causal_lm"] < 1e-8


# Training and merging ------------------------------------------------------------------------------------------------


@CASE
def test_training_saving_and_loading(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, values = case
    arch = ARCHITECTURES[name]
    model, curve = train(name, tmp_path / "run", **values)
    assert curve[-1] < 0.97 * curve[0]
    assert moved(model)
    assert same_tensors(base_tensors(model), base_tensors(fresh(name)))
    model.save_pretrained(tmp_path / "delta")
    again = PeftModel.from_pretrained(fresh(name), tmp_path / "delta").eval()
    assert same_tensors(tuned(again), tuned(model))
    assert identical(outputs(again, arch), outputs(model, arch))


# What to tune, and the switches of the configuration that its merged checkpoint has on.
SWITCHES = [
    ("llama-causal_lm", {**ADDED}, {"attention_bias", "mlp_bias"}),
    ("llama-causal_lm", {**ADDED, "bias_terms": ["query", "value"]}, {"attention_bias"}),
    ("llama-causal_lm", {**ADDED, "bias_terms": "intermediate"}, {"mlp_bias"}),
    ("qwen2-causal_lm", {}, set()),
]


@pytest.mark.parametrize("case", SWITCHES, ids=lambda case: "-".join([case[0], *sorted(case[2])]))
def test_a_trained_delta_merges_into_a_stock_checkpoint(
    case: tuple[str, dict[str, Any], set[str]], tmp_path: Path
) -> None:
    name, values, switches = case
    arch = ARCHITECTURES[name]
    model, _ = train(name, tmp_path / "run", **values)
    expected = outputs(model, arch)
    merged = model.merge_and_unload()
    assert {switch for switch in ("attention_bias", "mlp_bias") if getattr(merged.config, switch, False)} == switches
    merged.save_pretrained(tmp_path / "merged")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(arch.build())
    assert distance(outputs(loaded.eval(), arch), expected) <= 2e-6
    assert torch.equal(generate(loaded, arch), generate(merged, arch))


def tiny(class_name: str, **values: Any) -> nn.Module:
    """A causal language model of another family, built from its configuration."""
    config = getattr(transformers, class_name.replace("ForCausalLM", "Config"))(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **values,
    )
    return randomize_(getattr(transformers, class_name)(config).eval())


ATTENTION = {"bias_terms": ["query", "key", "value", "attention_output"]}


@pytest.mark.parametrize("class_name", ["Qwen3ForCausalLM", "GemmaForCausalLM", "OlmoForCausalLM"])
def test_families_with_a_switch_for_attention_only(class_name: str, tmp_path: Path) -> None:
    ids = torch.randint(4, VOCAB, (2, 6))
    model = fill_(get_peft_model(tiny(class_name), BitFitConfig(**ADDED, **ATTENTION)).eval())
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    assert merged.config.attention_bias
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=2e-6)

    everything = fill_(get_peft_model(tiny(class_name), BitFitConfig(**ADDED)).eval())
    before = state(everything)
    with pytest.raises(MergeError, match="no switch for the biases that were added to 6 layers"):
        everything.merge_and_unload()
    assert state(everything) == before


REFUSED = [
    ("qwen2-causal_lm", {}, 2 * 4),  # attention output, gate, up and down
    ("qwen2-causal_lm", {"bias_terms": "output"}, 2),
    ("t5-seq2seq_lm", {}, 2 * 6 + 2 * 10),
    ("llama-causal_lm", {"bias_terms": ["query", "lm_head"]}, 1),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]}-{case[1].get('bias_terms', 'all')}")
def test_without_a_switch_a_merge_is_refused(case: tuple[str, dict[str, Any], int]) -> None:
    name, values, count = case
    arch = ARCHITECTURES[name]
    model = fill_(tune(arch, **ADDED, **values))
    before, expected = state(model), outputs(model, arch)
    with pytest.raises(MergeError, match=rf"no switch .* {count} layers(?s:.*)Keep the delta separate"):
        model.merge_and_unload()
    assert state(model) == before
    model.merge_adapter()  # in memory it needs none
    assert distance(outputs(model, arch), expected) <= 1e-6
    model.unmerge_adapter()
    assert identical(outputs(model, arch), expected)


# Generating ----------------------------------------------------------------------------------------------------------

GENERATING = ["llama-causal_lm", "qwen2-causal_lm", "gpt2-causal_lm", "t5-seq2seq_lm", "bart-seq2seq_lm"]
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2, "top_k": 3},
    "configured": {"generation_config": transformers.GenerationConfig(num_beams=2, max_new_tokens=5, pad_token_id=0)},
}


def generate(model: nn.Module, arch: Architecture, *, rows: int = 3, seed: int = 7, **options: Any) -> torch.Tensor:
    """Token ids, of a fixed number of new ones."""
    ids = arch.inputs(rows)["input_ids"][:, :5]
    own = {} if "generation_config" in options else {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(seed)
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": 5, **own, **options}
    )


def two_adapters(name: str) -> PeftModel:
    arch = ARCHITECTURES[name]
    model = fill_(get_peft_model(arch.build(), config_for(arch), adapter_name="one").eval(), "one", std=2.0)
    model.add_adapter("two", config_for(arch))
    return fill_(model, "two", seed=2, std=2.0).eval()


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_adapters_on_and_off(name: str) -> None:
    arch = ARCHITECTURES[name]
    stock = generate(arch.build(), arch)
    model = two_adapters(name)
    answers = {}
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        answers[adapter] = generate(model, arch)
        assert not torch.equal(answers[adapter], stock)
    assert not torch.equal(answers["one"], answers["two"])
    with model.disable_adapter():
        assert torch.equal(generate(model, arch), stock)
    assert torch.equal(generate(model, arch), answers["two"])
    assert torch.equal(generate(model, arch, use_cache=False), answers["two"])
    model.merge_adapter()
    assert torch.equal(generate(model, arch), answers["two"])
    model.unmerge_adapter()
    in_place = model.get_base_model()
    in_place_answer = generate(in_place, arch)
    assert torch.equal(in_place_answer, answers["two"])


@pytest.mark.parametrize("way", ["greedy", "beams", "configured"])
@pytest.mark.parametrize("name", GENERATING)
def test_every_sequence_is_its_own_adapter_s(name: str, way: str) -> None:
    arch, options = ARCHITECTURES[name], WAYS[way]
    model = two_adapters(name)
    names = ["two", "__base__", "one"]
    mixed = generate(model, arch, adapter_names=names, **options)
    assert len(mixed) == 3
    for row, adapter in enumerate(names):
        if adapter == "__base__":
            alone = generate(arch.build(), arch, **options)
        else:
            model.set_adapter(adapter)
            alone = generate(model, arch, **options)
        shared = min(mixed.shape[1], alone.shape[1])  # a batch goes on until its longest sequence is done
        assert torch.equal(mixed[row, :shared], alone[row, :shared]), adapter
        assert not mixed[row, shared:].any()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_several_samples_of_each_example() -> None:
    arch = ARCHITECTURES["gpt2-causal_lm"]
    model = two_adapters("gpt2-causal_lm")
    sampled = generate(model, arch, adapter_names=["two", "one", "__base__"], **WAYS["sampled"])
    assert len(sampled) == 6
    with torch.no_grad():
        for row, adapter in enumerate(["two", "two", "one", "one", "__base__", "__base__"]):
            logits = model(input_ids=sampled[row : row + 1], adapter_names=[adapter]).logits[0]
            for place in range(5, sampled.shape[1]):
                assert sampled[row, place] in logits[place - 1].topk(3).indices


@pytest.mark.parametrize("name", ["llama-causal_lm", "t5-seq2seq_lm"])
def test_names_must_be_one_for_each_example(name: str) -> None:
    model = two_adapters(name)
    for options in ({}, {"num_beams": 3}):
        with pytest.raises(AdapterNameError, match="2 names for a batch of"):
            generate(model, ARCHITECTURES[name], adapter_names=["one", "two"], **options)
    with pytest.raises(AdapterNameError, match="three"):
        generate(model, ARCHITECTURES[name], adapter_names=["one", "two", "three"])
    assert torch.equal(generate(model, ARCHITECTURES[name], rows=1)[0], generate(model, ARCHITECTURES[name])[0])


def test_a_delta_of_a_seq2seq_model_loads_by_its_auto_class(tmp_path: Path) -> None:
    arch = ARCHITECTURES["t5-seq2seq_lm"]
    arch.build().save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    model = fill_(get_peft_model(base, BitFitConfig(**ADDED)).eval())
    model.save_pretrained(tmp_path / "delta")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "delta").eval()
    assert distance(outputs(loaded, arch), outputs(model, arch)) <= 2e-6
    assert torch.equal(generate(loaded, arch), generate(model, arch))
