"""One kind of layer at a time, slices, added biases, dtypes, and how PyTorch's own machinery sees a tuned layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES, HEADS, HIDDEN, randomize_
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D
from tuner_tester import (
    PREFIX,
    add_by_hand,
    base_tensors,
    by_hand,
    config_for,
    distance,
    file_tensors,
    fill_,
    identical,
    needs_a_compiler,
    outputs,
    same_tensors,
    state,
    tune,
    tuned_parameters,
)

from bitfit_hf import BitFitConfig, BitFitLayer
from bitfit_hf.errors import AdapterNameError, DeltaMismatchError, MergeError, NoMatchError, UnsupportedLayerError

# One layer -----------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 6), (4, 3, 5)),
    "Conv1D": (lambda: Conv1D(6, 5), (4, 3, 5)),
    "Conv1d": (lambda: nn.Conv1d(2, 6, 3), (4, 2, 7)),
    "Conv2d": (lambda: nn.Conv2d(2, 6, 3, groups=2), (4, 2, 7, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 6, 2), (4, 2, 4, 4, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 6, 3), (4, 2, 5, 5)),
    "LayerNorm": (lambda: nn.LayerNorm(5), (4, 3, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (4, 6, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 3)),
}
MIXED = ["one", "__base__", "two", "one"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind):
    make, shape = KINDS[kind]
    stock = Holder(randomize_(make())).eval().requires_grad_(False)
    original = copy.deepcopy(stock)
    x = torch.randn(shape)
    wanted = {"__base__": stock(x)}
    layer_class, bias = type(stock.layer), stock.layer.bias.clone()
    model = get_peft_model(stock, BitFitConfig(), adapter_name="one").eval()
    assert torch.equal(model(x), wanted["__base__"])
    model.add_adapter("two", BitFitConfig())
    for seed, name in enumerate(("one", "two"), start=1):
        fill_(model, name, seed=seed)
        with torch.no_grad():
            reference = copy.deepcopy(original)
            reference.layer.bias.add_(file_tensors(model, name)["layer.bitfit_bias"])
            wanted[name] = reference(x)
        model.set_adapter(name)
        assert torch.allclose(model(x), wanted[name], atol=1e-6)
    model.base_model.set_adapter(["one", "two"])
    assert torch.allclose(
        model(x) - wanted["__base__"], wanted["one"] + wanted["two"] - 2 * wanted["__base__"], atol=1e-5
    )
    with torch.no_grad():
        mixed = model(x, adapter_names=MIXED)
    for row, name in enumerate(MIXED):
        assert torch.allclose(mixed[row], wanted[name][row], atol=1e-5), name
    model.set_adapter("one")
    model.merge_adapter()
    assert torch.allclose(model(x), wanted["one"], atol=1e-6)
    model.unmerge_adapter()
    back = model.unload()
    assert type(back.layer) is layer_class
    assert torch.equal(back.layer.bias, bias)
    assert torch.equal(back(x), wanted["__base__"])


def test_nothing_passes_over_the_activations():
    """The effective bias goes into the layer's own operation: no more operations on activations than before."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.large = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() >= 64 * 5:
                self.large.append(str(function))
            return result

    def operations(model: nn.Module) -> list[str]:
        with Count() as count:
            model(torch.randn(64, 5)).sum().backward()
        return count.large

    stock = Holder(nn.Linear(5, 6))
    stock.layer.weight.requires_grad_(False)
    before = operations(stock)
    assert operations(get_peft_model(stock, BitFitConfig())) == before


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first):
    stock = randomize_(nn.MultiheadAttention(8, 2, batch_first=batch_first)).eval()
    reference = copy.deepcopy(stock)
    x = torch.randn(4, 4, 8)
    model = fill_(get_peft_model(Holder(stock), BitFitConfig())).eval()
    tensors = file_tensors(model)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "layer.bitfit_in_proj_bias": (24,),
        "layer.out_proj.bitfit_bias": (8,),
    }
    with torch.no_grad():
        reference.in_proj_bias.add_(tensors["layer.bitfit_in_proj_bias"])
        reference.out_proj.bias.add_(tensors["layer.out_proj.bitfit_bias"])
    for grad in (True, False):  # PyTorch has a fast path of its own without gradients
        with torch.set_grad_enabled(grad):
            for need_weights in (True, False):
                ours = model(x, x, x, need_weights=need_weights)[0]
                assert torch.allclose(ours, reference(x, x, x, need_weights=need_weights)[0], atol=1e-6)
    model.add_adapter("two", BitFitConfig())
    fill_(model, "two", seed=2)
    names = ["default", "two", "__base__", "two"]
    if not batch_first:
        with pytest.raises(UnsupportedLayerError, match="batch_first"):
            model(x[:, :3], x[:, :3], x[:, :3], adapter_names=names)
        return
    mixed, weights = model(x, x, x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(x, x, x)
        else:
            model.set_adapter(name)
            alone = model(x, x, x)
        assert torch.allclose(mixed[row], alone[0][row], atol=1e-5)
        assert torch.allclose(weights[row], alone[1][row], atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_the_fast_path_of_torch_s_encoder_layer_uses_the_deltas(grad):
    arch = ARCHITECTURES["torch_encoder"]
    model = fill_(tune(arch))
    reference = by_hand(arch, model)
    with torch.set_grad_enabled(grad):
        ours, theirs = model(**arch.inputs()), reference(**arch.inputs())
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert (ours - arch.build()(**arch.inputs())).abs().max() > 1e-3


def test_running_statistics_of_a_wrapped_batch_norm_do_not_move():
    arch = ARCHITECTURES["mlp"]
    model = get_peft_model(arch.build().train(), BitFitConfig())
    before = base_tensors(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()
        model(**arch.inputs(batch_size=4)).square().mean().backward()
        optimizer.step()
    assert same_tensors(base_tensors(model), before)
    assert "batch_norm.running_mean" in before
    assert file_tensors(model)["batch_norm.bitfit_bias"].any()
    assert not model.get_base_model().batch_norm.base_layer.training
    assert model.unload().train().batch_norm.training


# Free-standing vectors, tied and fused biases ------------------------------------------------------------------------


def test_free_standing_vectors_are_saved_under_their_own_name():
    tensors = file_tensors(tune(ARCHITECTURES["deberta-sequence"]))
    for layer in range(2):
        prefix = f"deberta.encoder.layer.{layer}.attention.self"
        assert {tuple(tensors[f"{prefix}.bitfit_{name}"].shape) for name in ("q_bias", "v_bias")} == {(HIDDEN,)}
    tensors = file_tensors(tune(ARCHITECTURES["xlnet-sequence"]))
    for name in ("r_w_bias", "r_r_bias"):
        assert tensors[f"transformer.layer.0.rel_attn.bitfit_{name}"].shape == (HEADS, HIDDEN // HEADS)


def test_the_tied_bias_of_a_language_model_s_head_is_saved_once():
    arch = ARCHITECTURES["bert-masked_lm"]
    model = fill_(tune(arch))
    assert sum("predictions" in name and "transform" not in name for name in file_tensors(model)) == 1
    merged = model.merge_and_unload()
    assert merged.cls.predictions.bias is merged.cls.predictions.decoder.bias


class TiedNet(nn.Module):
    """Two layers with one bias between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.bias = self.first.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_tied_bias_is_one_delta_that_every_place_uses(tmp_path):
    stock = TiedNet().requires_grad_(False)
    original, reference, x = copy.deepcopy(stock), copy.deepcopy(stock), torch.randn(3, 6)
    model = fill_(get_peft_model(stock, BitFitConfig(), adapter_name="one"), "one")
    (delta,) = file_tensors(model, "one").values()
    assert model.get_nb_trainable_parameters()[0] == 6
    reference.first.bias.add_(delta)
    assert torch.allclose(model(x), reference(x), atol=1e-6)

    reference.first.bias.requires_grad_(True)
    model(x).square().sum().backward()
    reference(x).square().sum().backward()
    ((_, parameter),) = tuned_parameters(model, "one")
    assert torch.allclose(parameter.grad, reference.first.bias.grad, atol=1e-5)

    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "one", **options)
        assert torch.allclose(loaded(x), reference(x), atol=1e-6), options
        ((_, parameter),) = tuned_parameters(loaded)
        with torch.no_grad():
            parameter.zero_()
        assert torch.equal(loaded(x), original(x)), options

    model.add_adapter("two", BitFitConfig())
    fill_(model, "two", seed=2)
    alone = {"one": model(x), "__base__": original(x)}
    model.set_adapter("two")
    alone["two"] = model(x)
    names = ["two", "__base__", "one"]
    mixed = model.eval()(x, adapter_names=names)
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], alone[name][row], atol=1e-5), name

    model.set_adapter("one")
    for _ in range(2):
        model.merge_adapter()
        assert torch.allclose(model(x), alone["one"], atol=1e-6)
        model.unmerge_adapter()
        assert torch.equal(stock.first.base_layer._parameters["bias"], original.first.bias)
        assert torch.equal(model(x), alone["one"])
    model.delete_adapter("two")
    assert torch.equal(model(x), alone["one"])
    merged = model.merge_and_unload()
    assert merged.first.bias is merged.second.bias
    assert torch.allclose(merged(x), alone["one"], atol=1e-6)


def gpt2_index(term: str) -> list[int]:
    start = ("query", "key", "value").index(term) * HIDDEN
    return list(range(start, start + HIDDEN))


def neox_index(term: str) -> list[int]:
    size = HIDDEN // HEADS
    start = ("query", "key", "value").index(term) * size
    return [head * 3 * size + start + i for head in range(HEADS) for i in range(size)]


FUSED = {
    "gpt2-causal_lm": ("transformer.h.{}.attn.c_attn", gpt2_index),
    "gpt2-sequence": ("transformer.h.{}.attn.c_attn", gpt2_index),
    "gpt_neox-causal_lm": ("gpt_neox.layers.{}.attention.query_key_value", neox_index),
    "bloom-causal_lm": ("transformer.h.{}.self_attention.query_key_value", neox_index),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("terms", [["query"], ["key"], ["value"], ["query", "value"]], ids="+".join)
def test_a_fused_bias_is_tuned_by_slice(name, terms, tmp_path):
    arch, (path, index) = ARCHITECTURES[name], FUSED[name]
    places = sorted(place for term in terms for place in index(term))
    model = fill_(tune(arch, bias_terms=terms))
    tensors = file_tensors(model)
    stock = arch.build()
    for layer in range(2):
        delta = tensors[f"{path.format(layer)}.bitfit_bias"]
        assert delta.shape == (len(places),)
        with torch.no_grad():
            stock.get_submodule(path.format(layer)).bias[places] += delta
    if "score.weight" in tensors:
        stock.score.weight.data.copy_(tensors["score.weight"])
    assert distance(outputs(model, arch), outputs(stock, arch)) <= 1e-6
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(arch.build(), tmp_path, low_cpu_mem_usage=True).eval()
    assert distance(outputs(loaded, arch), outputs(stock, arch)) <= 2e-6

    model.add_adapter("all", config_for(arch))
    fill_(model, "all", seed=2)
    alone = {"default": outputs(model, arch, batch_size=3)}
    model.set_adapter("all")
    alone["all"] = outputs(model, arch, batch_size=3)
    names = ["all", "default", "all"]
    mixed = outputs(model, arch, batch_size=3, adapter_names=names)
    for row, adapter in enumerate(names):
        assert (mixed[0][row] - alone[adapter][0][row]).abs().max() <= 1e-5

    model.set_adapter("default")
    before = base_tensors(model)
    model.merge_adapter()
    for layer in range(2):
        key = f"{path.format(layer)}.bias"
        untouched = [i for i in range(3 * HIDDEN) if i not in places]
        assert torch.equal(base_tensors(model)[key][untouched], before[key][untouched])
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), before)
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert same_tensors(file_tensors(other), tensors)
    model.delete_adapter("default")
    model.set_adapter("all")
    assert identical(outputs(model, arch, batch_size=3), alone["all"])


def test_a_slice_of_a_bfloat16_bias_is_added_in_float32():
    arch = ARCHITECTURES["gpt2-causal_lm"]
    stock = randomize_(arch.build()).to(torch.bfloat16)
    vector = stock.transformer.h[0].attn.c_attn.bias.detach().clone().float()
    model = fill_(get_peft_model(stock, BitFitConfig(bias_terms="key")), std=1e-3)
    vector[gpt2_index("key")] += file_tensors(model)["transformer.h.0.attn.c_attn.bitfit_bias"]
    assert torch.equal(stock.transformer.h[0].attn.c_attn.bias, vector.bfloat16())


def test_adapters_that_tune_different_biases_side_by_side():
    arch = ARCHITECTURES["bert-backbone"]
    model = fill_(tune(arch, "one", bias_terms="query"), "one")
    model.add_adapter("two", BitFitConfig(bias_terms="value"))
    fill_(model, "two", seed=2)
    one, two = (outputs(by_hand(arch, model, name), arch) for name in ("one", "two"))
    assert distance(outputs(model, arch), one) <= 1e-6
    model.set_adapter("two")
    assert distance(outputs(model, arch), two) <= 1e-6
    mixed = outputs(model, arch, adapter_names=["two", "one"])
    assert (mixed[0][0] - two[0][0]).abs().max() <= 1e-5
    assert (mixed[0][1] - one[0][1]).abs().max() <= 1e-5
    with pytest.raises(DeltaMismatchError, match="different biases"):
        model.base_model.add_weighted_adapter(["one", "two"], [1, 1], "both")
    merged = model.merge_and_unload(adapter_names=["one", "two"])
    reference = by_hand(arch, tune(arch), "default")
    assert merged.state_dict().keys() == reference.state_dict().keys()


@pytest.mark.parametrize("kind", ["wrapped", "in place"])
def test_two_heads_cannot_be_active_together(kind):
    model = ARCHITECTURES["bert-sequence"].build()
    if kind == "wrapped":
        model = get_peft_model(model, BitFitConfig(), adapter_name="one")
        model.add_adapter("two", BitFitConfig())
        switch = model.base_model.set_adapter
    else:
        model.add_adapter(BitFitConfig(), "one")
        model.add_adapter(BitFitConfig(), "two")
        switch = model.set_adapter
        model.set_adapter("one")
    before = state(model)
    active = [layer.active_adapters for layer in model.modules() if isinstance(layer, BitFitLayer)]
    with pytest.raises(AdapterNameError, match=r"\['one', 'two'\] have a task head each"):
        switch(["one", "two"])
    assert state(model) == before
    assert [layer.active_adapters for layer in model.modules() if isinstance(layer, BitFitLayer)] == active


def test_weighted_sums_refuse_what_has_no_meaning():
    model = tune(ARCHITECTURES["bert-backbone"], "one")
    model.add_adapter("two", BitFitConfig())
    combine = model.base_model.add_weighted_adapter
    before = state(model)
    for arguments, message in (
        ((["one", "three"], [1, 1], "new"), "three"),
        ((["one", "two"], [1], "new"), "1 weights"),
        (([], [], "new"), "0 adapters"),
        ((["one"], [1], "two"), "already"),
        ((["one"], [1], "query"), "module named"),
        ((["one"], [1], "new", "svd"), "linear"),
    ):
        with pytest.raises(AdapterNameError, match=message):
            combine(*arguments)
        assert state(model) == before


# Added biases --------------------------------------------------------------------------------------------------------

ADDED = ["llama-causal_lm", "llama-sequence", "modernbert-sequence", "t5-seq2seq_lm", "t5-sequence", "bias_free"]


@pytest.mark.parametrize("name", ADDED)
def test_added_biases_start_at_zero(name):
    arch = ARCHITECTURES[name]
    stock = randomize_(arch.build()).requires_grad_(False)
    before = outputs(stock, arch)
    model = get_peft_model(stock, BitFitConfig(add_missing_biases=True))
    assert identical(outputs(model, arch), before)
    added = [name for name in file_tensors(model) if "bitfit" in name]
    assert added
    assert not any("norm" in name.lower() or "lm_head" in name for name in added)
    assert all(not tensor.any() for name, tensor in file_tensors(model).items() if "bitfit" in name)


@pytest.mark.parametrize("terms", ["all", ["query", "key", "value", "attention_output"], ["intermediate"], ["query"]])
def test_added_biases_merge_where_the_configuration_has_a_switch(terms, tmp_path):
    arch = ARCHITECTURES["llama-causal_lm"]
    model = fill_(tune(arch, bias_terms=terms))
    tuned = outputs(model, arch)
    merged = model.merge_and_unload()
    assert distance(outputs(merged, arch), tuned) <= 1e-6
    assert merged.config.attention_bias is (terms != ["intermediate"])
    assert merged.config.mlp_bias is (terms in ("all", ["intermediate"]))
    merged.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert distance(outputs(loaded.eval(), arch), tuned) <= 2e-6


@pytest.mark.parametrize("terms", ["attention_layernorm", "lm_head", ["query", "output_layernorm"]])
def test_added_biases_without_a_switch_work_but_are_not_merged_for_good(terms):
    arch = ARCHITECTURES["llama-causal_lm"]
    stock = randomize_(arch.build()).requires_grad_(False)
    before = outputs(stock, arch)
    model = get_peft_model(stock, config_for(arch, bias_terms=terms))
    assert identical(outputs(model, arch), before)
    fill_(model)
    assert distance(outputs(model, arch), before) > 1e-3
    untouched = state(model)
    with pytest.raises(MergeError):
        model.merge_and_unload()
    assert state(model) == untouched


def test_a_bias_added_to_a_norm_is_added_to_its_output():
    arch = ARCHITECTURES["llama-causal_lm"]
    model = fill_(tune(arch, bias_terms="attention_layernorm"))
    norm = model.get_base_model().model.layers[0].input_layernorm
    x = torch.randn(2, 3, HIDDEN)
    delta = file_tensors(model)["model.layers.0.input_layernorm.bitfit_bias"]
    assert torch.equal(norm(x), norm.base_layer(x) + delta)
    before = state(model)
    with pytest.raises(MergeError, match="without a bias"):
        model.merge_adapter()
    assert state(model) == before
    model.add_adapter("two", config_for(arch, bias_terms="attention_layernorm"))
    fill_(model, "two", seed=2)
    names = ["two", "default", "__base__"]
    alone = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        alone[name] = outputs(model, arch, batch_size=3)
    alone["__base__"] = outputs(arch.build(), arch, batch_size=3)
    mixed = outputs(model, arch, batch_size=3, adapter_names=names)
    for row, name in enumerate(names):
        assert (mixed[0][row] - alone[name][0][row]).abs().max() <= 1e-5


def test_merging_in_memory_needs_no_switch():
    arch = ARCHITECTURES["t5-seq2seq_lm"]
    model = fill_(tune(arch))
    tuned, before = outputs(model, arch), base_tensors(model)
    model.merge_adapter()
    assert distance(outputs(model, arch), tuned) <= 1e-6
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), before)
    back = model.unload()
    assert all(module.bias is None for module in back.modules() if isinstance(module, nn.Linear))


# Merging -------------------------------------------------------------------------------------------------------------


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing():
    model = fill_(tune(ARCHITECTURES["bert-backbone"]))
    # In the middle, so that layers before and behind it would be merged by then, whichever way one goes.
    (delta,) = (parameter for name, parameter in tuned_parameters(model) if "layer.1.attention.self.query" in name)
    with torch.no_grad():
        delta[3] = float("inf")
    before = base_tensors(model)
    with pytest.raises(MergeError, match="NaN or Inf"):
        model.merge_adapter(safe_merge=True)
    assert same_tensors(base_tensors(model), before)
    assert not any(module.merged for module in model.modules() if isinstance(module, BitFitLayer))
    with pytest.raises(MergeError, match="NaN or Inf"):
        model.merge_and_unload(safe_merge=True)
    assert same_tensors(base_tensors(model), before)


def test_several_adapters_merge_one_after_the_other():
    arch = ARCHITECTURES["bert-backbone"]
    model = fill_(tune(arch, "one"), "one")
    model.add_adapter("two", BitFitConfig())
    fill_(model, "two", seed=2)
    before = base_tensors(model)
    model.base_model.set_adapter(["one", "two"])
    wanted = outputs(model, arch)
    model.merge_adapter(["one"])
    model.merge_adapter(["two"])
    assert distance(outputs(model, arch), wanted) <= 1e-6
    model.unmerge_adapter()
    assert same_tensors(base_tensors(model), before)
    assert identical(outputs(model, arch), wanted)


def test_disabling_merged_adapters_gives_the_base():
    arch = ARCHITECTURES["bert-sequence"]
    wanted = outputs(arch.build(), arch)
    model = fill_(tune(arch))
    model.merge_adapter()
    with model.disable_adapter():
        assert identical(outputs(model, arch), wanted)


# Mixed batches -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two() -> PeftModel:
    model = fill_(tune(ARCHITECTURES["bert-sequence"], "one"), "one")
    model.add_adapter("two", BitFitConfig())
    return fill_(model, "two", seed=2).eval()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one", "three"], "three"),
        (["one"], "1 names for a batch of 2"),
        (["one", "two", "one", "two"], "4 names for a batch of 2"),
        ([], "0 names"),
        ("one", "a list"),
        ([None, "one"], "None"),
    ],
)
def test_names_that_do_not_fit_the_batch_are_errors(two, names, message):
    arch = ARCHITECTURES["bert-sequence"]
    wanted = outputs(two, arch)
    with pytest.raises(AdapterNameError, match=message):
        outputs(two, arch, adapter_names=names)
    assert identical(outputs(two, arch), wanted)


def test_a_half_as_long_list_is_not_taken_for_folded_examples():
    model = tune(ARCHITECTURES["bert-backbone"], "one")
    with pytest.raises(AdapterNameError, match="2 names for a batch of 4"):
        outputs(model, ARCHITECTURES["bert-backbone"], batch_size=4, adapter_names=["one", "__base__"])


def test_mixed_batches_are_refused_in_training_and_while_merged(two):
    arch = ARCHITECTURES["bert-sequence"]
    two.train()
    with pytest.raises(UnsupportedLayerError, match="eval"):
        outputs(two, arch, adapter_names=["one", "two"])
    two.eval().merge_adapter()
    with pytest.raises(UnsupportedLayerError, match="unmerge"):
        outputs(two, arch, adapter_names=["one", "two"])
    two.unmerge_adapter()
    outputs(two, arch, adapter_names=["one", "two"])


def test_a_table_as_long_as_the_batch_is_not_taken_for_examples():
    """DeBERTa-v2 puts its table of relative positions through a LayerNorm; its length is this batch's."""
    arch = ARCHITECTURES["deberta_v2-sequence"]
    model = tune(arch, "one")
    length = model.get_base_model().deberta.encoder.rel_embeddings.weight.shape[0]
    with pytest.raises(UnsupportedLayerError, match=f"computes {length} rows for a batch of {length}"):
        outputs(model, arch, batch_size=length, adapter_names=["one"] * length)


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("stop")


def test_a_failed_mixed_batch_leaves_the_model_usable(two):
    arch = ARCHITECTURES["bert-sequence"]
    wanted = outputs(two, arch)
    pooler = two.get_base_model().bert.pooler
    pooler.activation = Broken()
    with pytest.raises(RuntimeError, match="stop"):
        outputs(two, arch, adapter_names=["one", "two"])
    pooler.activation = nn.Tanh()
    assert identical(outputs(two, arch), wanted)
    assert not any(module._forward_pre_hooks for module in two.modules())


def test_generation_takes_adapter_names():
    arch = ARCHITECTURES["gpt2-causal_lm"]
    model = fill_(tune(arch, "one"), "one", std=2.0)
    model.add_adapter("two", config_for(arch))
    fill_(model, "two", seed=2, std=2.0)
    names = ["two", "one", "__base__"]
    ids = torch.randint(4, 60, (3, 5))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=ids, **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=ids, **options)
        assert mixed[row].tolist() == alone[row].tolist()


# Dtypes and devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_effective_bias_is_formed_in_float32_and_cast_once(dtype):
    layer = nn.Linear(4, 64).to(dtype)
    stored = layer.bias.detach().clone()
    model = fill_(get_peft_model(Holder(layer), BitFitConfig()), std=1e-3)
    delta = file_tensors(model)["layer.bitfit_bias"]
    assert delta.dtype == torch.float32
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(layer.bias, (stored.to(wider) + delta.to(wider)).to(dtype))
    assert model(torch.randn(2, 4, dtype=dtype)).dtype == dtype


def test_small_steps_are_not_lost_on_a_bfloat16_base():
    model = get_peft_model(Holder(nn.Linear(4, 3).to(torch.bfloat16)), BitFitConfig())
    (parameter,) = (parameter for _, parameter in tuned_parameters(model))
    with torch.no_grad():
        parameter.add_(1.0)
        for _ in range(10):
            parameter.add_(1e-4)
    assert parameter[0].item() == pytest.approx(1.001, abs=1e-6)


def test_the_head_of_a_half_precision_model_is_trained_in_float32():
    arch = ARCHITECTURES["roberta-sequence"]
    model = get_peft_model(arch.build().half(), BitFitConfig(), autocast_adapter_dtype=False)
    result = model(**arch.inputs(), **arch.labels())
    assert result.logits.dtype == torch.float32
    result.loss.backward()
    gradients = {name: p.grad for name, p in tuned_parameters(model) if "classifier" in name}
    assert len(gradients) == 4
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    back = model.merge_and_unload()
    assert {parameter.dtype for parameter in back.parameters()} == {torch.float16}
    assert back(**arch.inputs()).logits.dtype == torch.float16


def test_autocast():
    arch = ARCHITECTURES["bert-sequence"]
    model = fill_(tune(arch))
    reference = by_hand(arch, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(**arch.inputs(), **arch.labels()), reference(**arch.inputs(), **arch.labels())
    assert torch.allclose(ours.logits.float(), theirs.logits.float(), atol=5e-3)
    ours.loss.backward()
    assert all(p.grad.dtype == torch.float32 for _, p in tuned_parameters(model) if p.grad is not None)


def test_an_offloaded_base():
    from accelerate import cpu_offload

    arch = ARCHITECTURES["bert-backbone"]
    stock = arch.build()
    cpu_offload(stock, execution_device="cpu")
    assert all(parameter.is_meta for parameter in stock.parameters())
    model = fill_(get_peft_model(stock, BitFitConfig()).eval())
    assert not any(parameter.is_meta for _, parameter in tuned_parameters(model))
    assert distance(outputs(model, arch), outputs(by_hand(arch, model), arch)) <= 1e-6
    assert model.peft_config["default"].base_fingerprint == tune(arch).peft_config["default"].base_fingerprint


def test_moving_and_emptying_devices_takes_deltas_along():
    model = fill_(tune(ARCHITECTURES["gpt2-causal_lm"], bias_terms="query"))
    model.to("meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert {parameter.dtype for _, parameter in tuned_parameters(model)} == {torch.float32}


# PyTorch's machinery -------------------------------------------------------------------------------------------------


@needs_a_compiler
def test_torch_compile(tmp_path):
    arch = ARCHITECTURES["bert-sequence"]
    model = fill_(tune(arch))
    wanted, tensors = outputs(model, arch), file_tensors(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert distance(outputs(compiled, arch), wanted) <= 1e-6
    compiled(**arch.inputs(), **arch.labels()).loss.backward()
    gradients = {name: p.grad.clone() for name, p in tuned_parameters(model) if p.grad is not None}
    model.zero_grad()
    model(**arch.inputs(), **arch.labels()).loss.backward()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, dict(model.named_parameters())[name].grad, atol=1e-6), name
    compiled._orig_mod.save_pretrained(tmp_path)
    fill_(model, seed=7)
    assert distance(outputs(compiled, arch), outputs(model, arch)) <= 1e-6
    loaded = PeftModel.from_pretrained(arch.build(), tmp_path)
    assert same_tensors(file_tensors(loaded), tensors)
    torch.compiler.reset()


@needs_a_compiler
def test_torch_compile_of_the_backbone_is_one_graph():
    arch = ARCHITECTURES["bert-backbone"]
    model = fill_(tune(arch)).get_base_model()
    wanted = outputs(model, arch)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert distance(outputs(compiled, arch), wanted) <= 1e-6
    torch.compiler.reset()


def test_names_saved_from_a_compiled_part_are_stock_names():
    arch = ARCHITECTURES["bert-sequence"]
    model = fill_(tune(arch))
    tensors = file_tensors(model)
    inner = model.get_base_model()
    inner.bert.encoder.layer[0] = torch.compile(inner.bert.encoder.layer[0], backend="eager")
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert same_tensors(file_tensors(model), tensors)
    torch.compiler.reset()


def test_a_tuned_layer_looks_like_the_stock_layer():
    model = tune(ARCHITECTURES["whisper-seq2seq_lm"])
    conv = model.get_base_model().model.encoder.conv1
    assert isinstance(conv, BitFitLayer)
    assert conv.stride == (1,)
    assert isinstance(conv.base_layer, nn.Conv1d)
    assert type(conv.base_layer).__name__ == "Conv1d"
    assert list(conv.base_layer.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in conv.base_layer.named_parameters()] == ["weight", "bias"]
    with pytest.raises(AttributeError):
        conv.nowhere  # noqa: B018


class WeightNormed(nn.Module):
    """Layers with a parametrized weight, as in the positional convolution of Wav2Vec2; PyTorch gives those a
    `__deepcopy__` of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x))


def test_a_copy_of_a_layer_with_a_parametrized_weight_keeps_its_deltas():
    model = fill_(get_peft_model(WeightNormed(), BitFitConfig(modules_to_save=["last"])))
    x = torch.randn(2, 4)
    twin = copy.deepcopy(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(twin(x), model(x))
    fill_(twin, seed=3)
    assert not torch.equal(twin(x), model(x))
    with pytest.raises(AttributeError, match="__deepcopy__"):
        model.get_base_model().body.__deepcopy__  # noqa: B018


def test_a_state_dict_of_the_base_loads_under_the_adapters():
    arch = ARCHITECTURES["bert-backbone"]
    model = fill_(tune(arch))
    other = randomize_(arch.build(), seed=3)
    live = dict(model.named_parameters())
    renamed = {PREFIX + name: tensor for name, tensor in base_tensors(other).items()}
    for name in list(live):
        stock = name.replace(".base_layer", "")
        if stock in renamed:
            live[name].data.copy_(renamed[stock])
    wanted = outputs(add_by_hand(other, file_tensors(model)), arch)
    assert distance(outputs(model, arch), wanted) <= 1e-6


def test_twenty_steps_of_adamw_equal_the_model_unfrozen_by_hand():
    """Key biases have a gradient of rounding noise only, which Adam turns into steps, so they are left out."""
    arch = ARCHITECTURES["bert-sequence"]
    terms = ["query", "value", "attention_output", "intermediate", "output", "output_layernorm", "pooler"]
    model = tune(arch, bias_terms=terms)
    tensors = file_tensors(model)
    reference = by_hand(arch, model).requires_grad_(False)
    chosen = {name: reference.get_parameter(name.replace("bitfit_", "")) for name in tensors}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    base = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    optimizers = [
        torch.optim.AdamW(list(parameters), lr=1e-3, weight_decay=0.0)
        for parameters in ((p for p in model.parameters() if p.requires_grad), chosen.values())
    ]
    for step in range(20):
        losses = []
        for trained, optimizer in zip((model, reference), optimizers, strict=True):
            loss = trained(**arch.inputs(4, seed=step), **arch.labels(4, seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, tensor in file_tensors(model).items():
        wanted = chosen[name].detach() - base[name] if "bitfit_" in name else chosen[name]
        assert (tensor - wanted).abs().max() <= 1e-5, name


def test_bert_base_has_the_paper_s_number_of_biases():
    with torch.device("meta"):
        stock = BertForSequenceClassification(BertConfig())
    model = get_peft_model(stock, BitFitConfig())
    sizes = [p.numel() for name, p in tuned_parameters(model) if "bitfit_bias" in name]
    assert sum(sizes) == 102_912
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 102_912 + 768 * 2 + 2


def test_targets_that_the_head_holds_are_not_tuned_twice():
    arch = ARCHITECTURES["roberta-sequence"]
    with pytest.raises(NoMatchError):
        tune(arch, target_modules=["classifier.dense"])
    model = tune(arch)
    assert not any(isinstance(module, BitFitLayer) for module in model.get_base_model().classifier.modules())
