"""Every architecture of the zoo against every operation of a PEFT tuner that has a meaning for biases."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, HEAD_KINDS, Architecture, output_tensors, randomize_
from expected_heads import EXPECTED as EXPECTED_HEADS
from expected_terms import EXPECTED
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from tuner_tester import (
    PREFIX,
    Tensors,
    add_by_hand,
    base_tensors,
    by_hand,
    config_for,
    distance,
    file_tensors,
    fill_,
    frozen,
    identical,
    outputs,
    same_tensors,
    state,
    tune,
    tuned_parameters,
)

from bitfit_hf import BitFitLayer
from bitfit_hf.errors import MergeError, UnsupportedLayerError

EVERY = pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=str)
STOCK = pytest.mark.parametrize("arch", [a for a in ARCHITECTURES.values() if a.is_transformers], ids=str)


def input_of_head(model: nn.Module, arch: Architecture) -> list[torch.Tensor]:
    """What the backbone gives to the head's first layer."""
    heads = EXPECTED_HEADS[arch.name]
    leaf = next(module for name, module in model.named_modules() if name.removeprefix(PREFIX) in heads)
    seen: list[torch.Tensor] = []
    handle = leaf.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    outputs(model, arch)
    handle.remove()
    return seen


# Numbers -------------------------------------------------------------------------------------------------------------


@EVERY
def test_a_fresh_adapter_changes_no_bit_of_the_output(arch):
    stock = randomize_(frozen(arch))
    before = outputs(stock, arch)
    model = get_peft_model(stock, config_for(arch))
    assert identical(outputs(model, arch), before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in tuned_parameters(model)}
    assert all(parameter.dtype == torch.float32 for _, parameter in tuned_parameters(model))


@EVERY
def test_a_fresh_adapter_changes_no_bit_of_a_bfloat16_backbone(arch):
    stock = randomize_(frozen(arch)).to(torch.bfloat16)
    inputs = arch.inputs()
    floats = {name: value.bfloat16() for name, value in inputs.items() if value.is_floating_point()}
    look = (lambda model: input_of_head(model, bf16)) if arch.kind in HEAD_KINDS else (lambda m: outputs(m, bf16))
    bf16 = Architecture(arch.name, arch.family, arch.kind, arch.factory, lambda *_: {**inputs, **floats})
    before = look(stock)
    model = get_peft_model(stock, config_for(arch))
    assert identical(look(model), before)
    assert all(parameter.dtype == torch.float32 for _, parameter in tuned_parameters(model))


@EVERY
def test_outputs_equal_those_of_a_model_whose_biases_were_set_by_hand(arch):
    model = fill_(tune(arch))
    untouched = outputs(arch.build(), arch)
    found, wanted = outputs(model, arch), outputs(by_hand(arch, model), arch)
    assert distance(found, wanted) <= 1e-6
    assert distance(found, untouched) > 1e-3


@EVERY
def test_every_selected_bias_reads_as_base_plus_delta(arch):
    base = base_tensors(arch.build())
    model = fill_(tune(arch))
    reference = add_by_hand(arch.build(), file_tensors(model))
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, BitFitLayer):
            path = ".".join(part for part in name.removeprefix(PREFIX).split(".") if part != "base_layer")
            for parameter in module.bias_parameters:
                effective = getattr(module.base_layer, parameter)
                wanted = getattr(reference.get_submodule(path), parameter)
                if effective is None:
                    assert wanted is None
                elif parameter in module.base_layer._parameters:
                    assert torch.equal(effective, wanted), path
                    seen += 1
    assert seen or not base


def loss_of(model: nn.Module, arch: Architecture) -> torch.Tensor:
    result = model(**arch.inputs(), **arch.labels())
    if arch.trainable:
        return result.loss
    return sum((tensor**2).mean() for tensor in output_tensors(result) if tensor.requires_grad)


def unfreeze_by_hand(arch: Architecture, tensors: Tensors) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A stock model with its biases and its head unfrozen, and these parameters by their name in a file."""
    model = add_by_hand(arch.build(), tensors)
    model.requires_grad_(False)
    chosen = {}
    for name in tensors:
        path, _, last = name.rpartition(".")
        chosen[name] = getattr(model.get_submodule(path), last.removeprefix("bitfit_"))
        if chosen[name].is_floating_point():
            chosen[name].requires_grad_(True)
    return model, chosen


@EVERY
def test_training_equals_that_of_a_model_unfrozen_by_hand(arch):
    model = tune(arch)
    start = file_tensors(model)
    frozen = base_tensors(model)
    oracle, chosen = unfreeze_by_hand(arch, start)
    base = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    ours = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    theirs = torch.optim.SGD([p for p in chosen.values() if p.requires_grad], lr=0.1)
    moved = set()
    for step in range(4):
        losses = []
        for trained, optimizer in ((model, ours), (oracle, theirs)):
            optimizer.zero_grad()
            losses.append(loss_of(trained, arch))
            losses[-1].backward()
        assert abs(losses[0].item() - losses[1].item()) <= 1e-6, step
        live = {name.removeprefix(PREFIX): p for name, p in live_by_file_name(model).items()}
        assert live.keys() == chosen.keys()
        for name, parameter in chosen.items():
            if not parameter.requires_grad:
                continue
            assert (live[name].grad is None) == (parameter.grad is None), name
            if parameter.grad is not None:
                assert torch.allclose(live[name].grad, parameter.grad, rtol=1e-4, atol=1e-6), name
                if parameter.grad.any():
                    moved.add(name)
        ours.step()
        theirs.step()
    assert moved
    for name, tensor in file_tensors(model).items():
        wanted = chosen[name] - base[name] if "bitfit_" in name else chosen[name]
        assert torch.allclose(tensor, wanted, atol=1e-5), name
        assert torch.equal(tensor, start[name]) == (name not in moved), name
    assert same_tensors(base_tensors(model), frozen)


def live_by_file_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors themselves by the name they get in a file."""
    found, seen = {}, set()
    for name, parameter in tuned_parameters(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[file_name(name)] = parameter
    return found


def file_name(name: str) -> str:
    parts = name.split(".")
    inserted = ("base_layer", "modules_to_save", "default", "bitfit_value")
    return ".".join(part.removeprefix("bitfit_head_") for part in parts if part not in inserted)


# Files ---------------------------------------------------------------------------------------------------------------


@EVERY
def test_the_files_hold_the_deltas_and_the_head_and_nothing_else(arch, tmp_path):
    model = fill_(tune(arch))
    stock = dict(arch.build().named_parameters(remove_duplicate=False))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    found = load_file(tmp_path / "adapter_model.safetensors")
    heads = EXPECTED_HEADS[arch.name]
    wanted = {name for name in stock if any(name == head or name.startswith(f"{head}.") for head in heads)}
    if not arch.bias_free:
        wanted |= {f"{row.module}.bitfit_{row.parameter}" for row in EXPECTED[arch.name]}
        assert found.keys() == {PREFIX + name for name in wanted}
        for row in EXPECTED[arch.name]:
            tensor = found[f"{PREFIX}{row.module}.bitfit_{row.parameter}"]
            assert tensor.shape == stock[f"{row.module}.{row.parameter}"].shape
    else:
        added = found.keys() - {PREFIX + name for name in wanted}
        assert added
        assert all(name.endswith(".bitfit_bias") for name in added)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "BITFIT"
    assert sorted(config.get("modules_to_save") or []) == sorted(heads)


def auto_peft_class(folder) -> type:
    """The class of PEFT's that loads a delta together with its base, by what its configuration says."""
    suffixes = {
        "SEQ_CLS": "ForSequenceClassification",
        "TOKEN_CLS": "ForTokenClassification",
        "QUESTION_ANS": "ForQuestionAnswering",
        "CAUSAL_LM": "ForCausalLM",
        "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
        "FEATURE_EXTRACTION": "ForFeatureExtraction",
        None: "",
    }
    return getattr(peft, "AutoPeftModel" + suffixes[PeftConfig.from_pretrained(folder).task_type])


class Saved:
    """A tuned model of an architecture, its base and its delta on disk, and what is expected of loading it."""

    def __init__(self, arch: Architecture, folder: Path) -> None:
        stock = arch.build()
        self.cls = type(stock)
        self.base, self.delta = folder / "base", folder / "delta"
        stock.save_pretrained(self.base)
        tuned = fill_(get_peft_model(self.fresh(), config_for(arch)).eval())
        tuned.save_pretrained(self.delta)
        self.tensors, self.outputs, self.untuned = file_tensors(tuned), outputs(tuned, arch), base_tensors(stock)

    def fresh(self) -> nn.Module:
        return self.cls.from_pretrained(self.base)


def second_adapter(saved: Saved, arch: Architecture) -> nn.Module:
    model = fill_(get_peft_model(saved.fresh(), config_for(arch), adapter_name="first"), "first", seed=2)
    model.load_adapter(saved.delta, adapter_name="tuned")
    model.set_adapter("tuned")
    return model


def in_place(saved: Saved, arch: Architecture) -> nn.Module:
    model = saved.fresh()
    model.load_adapter(str(saved.delta), adapter_name="tuned")
    return model


def second_in_place(saved: Saved, arch: Architecture) -> nn.Module:
    model = saved.fresh()
    model.add_adapter(config_for(arch), "first")
    model.load_adapter(str(saved.delta), adapter_name="tuned")
    model.set_adapter("tuned")
    return model


ROUTES = {
    "AutoModel": lambda saved, arch: getattr(transformers, saved.cls.__name__).from_pretrained(
        saved.delta, adapter_name="tuned"
    ),
    "AutoPeftModel": lambda saved, arch: auto_peft_class(saved.delta).from_pretrained(
        saved.delta, adapter_name="tuned"
    ),
    "low_cpu_mem_usage": lambda saved, arch: PeftModel.from_pretrained(
        saved.fresh(), saved.delta, adapter_name="tuned", low_cpu_mem_usage=True
    ),
    "second adapter": second_adapter,
}
MORE_ROUTES = {
    "PeftModel": lambda saved, arch: PeftModel.from_pretrained(saved.fresh(), saved.delta, adapter_name="tuned"),
    "trainable": lambda saved, arch: PeftModel.from_pretrained(
        saved.fresh(), saved.delta, adapter_name="tuned", is_trainable=True
    ),
    "load_adapter": in_place,
    "second adapter in place": second_in_place,
}
# One of each: a task head, a tied bias, free vectors, slices, added biases, a class that is its own backbone.
VARIED = {"bert-sequence", "bert-masked_lm", "deberta-sequence", "gpt2-causal_lm", "t5-sequence", "whisper-audio"}


def routes(arch: Architecture) -> dict:
    """Every way for the varied ones; for the others `AutoModel`, and one way more, another for the next one."""
    if arch.name in VARIED:
        return ROUTES | MORE_ROUTES
    others = [name for name in ROUTES if name != "AutoModel"]
    chosen = ("AutoModel", others[list(ARCHITECTURES).index(arch.name) % len(others)])
    return {name: ROUTES[name] for name in chosen}


@STOCK
def test_every_way_of_loading_gives_the_same_tensors_and_outputs(arch, tmp_path):
    saved = Saved(arch, tmp_path)
    for route, load in routes(arch).items():
        model = load(saved, arch).eval()
        assert same_tensors(file_tensors(model, "tuned"), saved.tensors), route
        assert distance(outputs(model, arch), saved.outputs) <= 2e-6, route
        assert same_tensors(base_tensors(model), saved.untuned), route
        assert "_load_pretrained_model" not in vars(model), route
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        tuned = {name for name, _ in tuned_parameters(model, "tuned")}
        if "second" not in route:
            assert (trainable == tuned) if route == "trainable" else not trainable & tuned, route


# Merging, unloading, disabling ---------------------------------------------------------------------------------------

# Merging for good needs a place for the bias in the class's own checkpoint.
HAVE_SWITCH = {"llama-causal_lm", "llama-sequence", "modernbert-sequence"}
NO_SWITCH = {name for name, arch in ARCHITECTURES.items() if arch.bias_free} - HAVE_SWITCH


@EVERY
def test_merging_and_unmerging_gives_the_stored_biases_back(arch):
    model = fill_(tune(arch))
    before, tuned = base_tensors(model), outputs(model, arch)
    for safe in (False, True):
        model.base_model.merge_adapter(safe_merge=safe)
        assert distance(outputs(model, arch), tuned) <= 1e-6, safe
        merged = base_tensors(model)
        assert not same_tensors(merged, before), safe
        model.base_model.unmerge_adapter()
        assert same_tensors(base_tensors(model), before), safe
        assert identical(outputs(model, arch), tuned), safe


@EVERY
def test_merge_and_unload_gives_a_stock_model(arch, tmp_path):
    model = fill_(tune(arch))
    stock = arch.build()
    tuned = outputs(model, arch)
    if arch.name in NO_SWITCH:
        before = state(model)
        with pytest.raises(MergeError, match="switch"):
            model.merge_and_unload()
        assert state(model) == before
        return
    wanted = add_by_hand(arch.build(), file_tensors(model))
    merged = model.merge_and_unload()
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    assert distance(outputs(merged, arch), tuned) <= 1e-6
    if not arch.bias_free:
        assert merged.state_dict().keys() == wanted.state_dict().keys()
        assert same_tensors(dict(merged.state_dict()), dict(wanted.state_dict()))
    assert not hasattr(merged, "peft_config")
    if arch.is_transformers:
        merged.save_pretrained(tmp_path)
        assert not (tmp_path / "adapter_config.json").exists()
        loaded, info = type(merged).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert distance(outputs(loaded.eval(), arch), tuned) <= 2e-6


@EVERY
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
def test_unload_gives_the_base_back(arch, merged):
    stock = frozen(arch)
    values, before = {k: v.clone() for k, v in stock.state_dict().items()}, state(stock)
    wanted = outputs(stock, arch)
    model = fill_(get_peft_model(stock, config_for(arch)))
    if merged:
        model.merge_adapter()
    back = model.unload()
    assert back is stock
    after = state(back)
    for part in ("modules", "attributes", "peft", "labels", "problem"):
        assert after[part] == before[part], part
    assert same_tensors(dict(back.state_dict()), values)
    assert identical(outputs(back, arch), wanted)


@EVERY
def test_disabled_adapters_leave_the_base(arch):
    wanted = outputs(frozen(arch), arch)
    model = fill_(tune(arch))
    tuned = outputs(model, arch)
    with model.disable_adapter():
        assert identical(outputs(model, arch), wanted)
    assert identical(outputs(model, arch), tuned)
    assert distance(tuned, wanted) > 1e-3


@STOCK
def test_adapters_of_a_stock_model_are_switched_off_and_on(arch):
    wanted = outputs(frozen(arch), arch)
    model = arch.build()
    model.add_adapter(config_for(arch))
    tuned = outputs(fill_(model), arch)
    model.disable_adapters()
    assert identical(outputs(model, arch), wanted)
    model.enable_adapters()
    assert identical(outputs(model, arch), tuned)
    assert distance(tuned, wanted) > 1e-3


# Several adapters ----------------------------------------------------------------------------------------------------


def with_two(arch: Architecture) -> tuple[PeftModel, dict[str, list[torch.Tensor]]]:
    """A model with the adapters "one" and "two", and what each gives by itself on a batch of 4."""
    alone = {"__base__": outputs(arch.build(), arch, batch_size=4)}
    model = fill_(tune(arch, "one"), "one", seed=1)
    alone["one"] = outputs(model, arch, batch_size=4)
    model.add_adapter("two", config_for(arch))
    fill_(model, "two", seed=2)
    alone["two"] = outputs(by_hand(arch, model, "two"), arch, batch_size=4)
    return model.eval(), alone


@EVERY
def test_adapters_are_switched_combined_and_deleted(arch):
    model, alone = with_two(arch)
    assert identical(outputs(model, arch, batch_size=4), alone["one"])
    model.set_adapter("two")
    assert distance(outputs(model, arch, batch_size=4), alone["two"]) <= 1e-6
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in tuned_parameters(model, "two")}
    model.set_adapter("one")
    assert identical(outputs(model, arch, batch_size=4), alone["one"])

    first, second = file_tensors(model, "one"), file_tensors(model, "two")
    model.base_model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "mixed")
    mixed = file_tensors(model, "mixed")
    for name, tensor in mixed.items():
        wanted = 0.5 * first[name] - 2.0 * second[name] if "bitfit_" in name else first[name]
        assert torch.equal(tensor, wanted), name
    assert identical(outputs(model, arch, batch_size=4), alone["one"])

    if not EXPECTED_HEADS[arch.name]:
        model.base_model.set_adapter(["one", "two"])
        summed = add_by_hand(add_by_hand(arch.build(), first), second)
        assert distance(outputs(model, arch), outputs(summed, arch)) <= 1e-6
        model.set_adapter("one")

    status = model.get_model_status()
    assert status.active_adapters == ["one"]
    assert status.available_adapters == ["mixed", "one", "two"]
    layers = model.get_layer_status()
    assert len(layers) == len({layer.name for layer in layers})
    assert all(layer.requires_grad == {"one": True, "two": False, "mixed": False} for layer in layers)

    model.delete_adapter("one")
    assert not any(True for _ in tuned_parameters(model, "one"))
    model.set_adapter("two")
    assert distance(outputs(model, arch, batch_size=4), alone["two"]) <= 1e-6


# What reads a bias past the layer's own forward, or keeps the batch elsewhere than in front, refuses mixed batches.
NOT_MIXED = {
    "mamba-causal_lm": "read by other code",
    "mamba2-causal_lm": "read by other code",
    "torch_encoder": "read by other code",
    "xlnet-sequence": "do not belong to single examples",
    "deberta_v2-sequence": "do not belong to single examples",
    "whisper-audio-weighted": "`layer_weights` is read by a WhisperForAudioClassification as a whole",
}


@EVERY
def test_every_example_of_a_batch_gets_its_own_adapter(arch):
    model, alone = with_two(arch)
    for names in (["one", "two", "__base__", "one"], ["two", "two", "one", "__base__"], ["__base__"] * 4, ["two"] * 4):
        if arch.name in NOT_MIXED:
            with pytest.raises(UnsupportedLayerError, match=NOT_MIXED[arch.name]):
                outputs(model, arch, batch_size=4, adapter_names=names)
            continue
        found = outputs(model, arch, batch_size=4, adapter_names=names)
        assert len(found) == len(alone["one"])
        compared = 0
        for position, tensor in enumerate(found):
            if tensor.shape[:1] != (4,):
                continue
            compared += 1
            for row, name in enumerate(names):
                wanted = alone[name][position][row]
                if tensor.dim() == 2 and arch.kind == "contrastive" and tensor.shape == (4, 4):
                    continue  # scores between the examples
                assert (tensor[row] - wanted).abs().max() <= 1e-5, (position, row, name)
        assert compared
    assert identical(outputs(model, arch, batch_size=4), alone["one"])


# Copies, casts, training modes ---------------------------------------------------------------------------------------


@EVERY
def test_copies_and_pickles_are_models_of_their_own(arch):
    model = fill_(tune(arch))
    buffer = io.BytesIO()
    torch.save(
        model, buffer
    )  # before it runs: where a model collects hidden states, transformers hooks local functions
    buffer.seek(0)
    wanted, tensors = outputs(model, arch), file_tensors(model)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert identical(outputs(other, arch), wanted)
        fill_(other, seed=5)
        assert distance(outputs(other, arch), wanted) > 1e-3
        assert distance(outputs(other, arch), outputs(by_hand(arch, other), arch)) <= 1e-6
        assert same_tensors(file_tensors(model), tensors)
        other.unload()
        assert identical(outputs(model, arch), wanted)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_deltas_and_head_stay_float32_when_the_model_is_cast(arch, dtype):
    model = fill_(tune(arch))
    tensors = file_tensors(model)
    model.to(dtype)
    assert {p.dtype for _, p in tuned_parameters(model)} == {torch.float32}
    assert same_tensors(file_tensors(model), tensors)
    for module in model.modules():
        if isinstance(module, BitFitLayer):
            for parameter in module.bias_parameters:
                stored, effective = module.base_layer._parameters.get(parameter), None
                deltas = getattr(module, f"bitfit_{parameter}")
                if parameter in module.base_layer._parameters:
                    effective = getattr(module.base_layer, parameter)
                if stored is not None and "default" in deltas:
                    assert effective.dtype == dtype
                    assert torch.equal(effective, (stored.float() + deltas["default"]).to(dtype))
    model.float()
    assert same_tensors(file_tensors(model), tensors)


@EVERY
def test_a_bfloat16_base_merges_to_the_rounded_sum_and_unmerges_exactly(arch):
    model = fill_(get_peft_model(randomize_(arch.build()).to(torch.bfloat16), config_for(arch)), std=1e-3)
    before = base_tensors(model)
    deltas = file_tensors(model)
    model.merge_adapter()
    after = base_tensors(model)
    for name, delta in deltas.items():
        if "bitfit_" in name:
            stored = name.replace(".bitfit_", ".")
            if stored in after:
                base = before.get(stored)
                wanted = delta if base is None else base.float() + delta
                assert torch.equal(after[stored], wanted.to(torch.bfloat16)), name
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), before)


GRADIENT_CHECKPOINTING = ["bert-sequence", "llama-causal_lm-biased", "vit-image", "bart-seq2seq_lm", "gpt2-causal_lm"]


@pytest.mark.parametrize("name", GRADIENT_CHECKPOINTING)
@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_gradient_checkpointing_changes_no_gradient(name, in_place):
    arch = ARCHITECTURES[name]
    gradients = []
    for checkpointing in (False, True):
        if in_place:
            model = arch.build()
            model.add_adapter(config_for(arch))
        else:
            model = tune(arch)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        loss_of(model, arch).backward()
        gradients.append({n: p.grad for n, p in tuned_parameters(model) if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for key, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][key], atol=1e-6), key
