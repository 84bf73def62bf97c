"""The paper's terms on every architecture, against `expected_terms.py` and against the models themselves."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, HIDDEN, MLP, VOCAB, TrapNet, build, randomize_, shared, snapshot
from expected_terms import EXPECTED, QKV, UNKNOWN_VECTORS, WHOLE, Row, places
from torch import nn

from bitfit_hf.terms import SYMBOLS, TERMS, find_biases, resolve_terms, select_biases, unknown_vectors

ALL = pytest.mark.parametrize("name", ARCHITECTURES)
WITH_BIASES = [name for name, arch in ARCHITECTURES.items() if not arch.bias_free]


# Terms and their names -----------------------------------------------------------------------------------------------


def test_terms_are_the_documented_ones():
    assert TERMS == (
        "query", "key", "value", "attention_output", "attention_layernorm", "intermediate", "output",
        "output_layernorm", "embedding_layernorm", "pooler", "lm_head", "other",
    )  # fmt: skip


PAPER_SYMBOLS = {
    "b_q": "query",
    "b_k": "key",
    "b_v": "value",
    "b_m1": "attention_output",
    "b_LN1": "attention_layernorm",
    "b_m2": "intermediate",
    "b_m3": "output",
    "b_LN2": "output_layernorm",
}


@pytest.mark.parametrize(("symbol", "term"), PAPER_SYMBOLS.items())
def test_symbols_of_the_paper(symbol, term):
    assert SYMBOLS[term] == symbol
    assert resolve_terms(symbol) == resolve_terms([symbol]) == (term,)


def test_terms_without_a_symbol_are_shown_by_name():
    assert {term: SYMBOLS[term] for term in TERMS if term not in PAPER_SYMBOLS.values()} == {
        term: term for term in ("embedding_layernorm", "pooler", "lm_head", "other")
    }


def test_presets_and_lists():
    assert resolve_terms("all") == TERMS
    assert resolve_terms("query+intermediate") == ("query", "intermediate")
    assert resolve_terms(["intermediate", "query"]) == ("query", "intermediate"), "in the order of TERMS"
    assert resolve_terms(("b_m2", "intermediate")) == ("intermediate",), "each once"
    assert resolve_terms(["query+intermediate", "pooler"]) == ("query", "intermediate", "pooler")
    assert resolve_terms(["pooler", "all"]) == TERMS


# What is found -------------------------------------------------------------------------------------------------------


def test_every_architecture_has_an_expectation():
    assert EXPECTED.keys() == ARCHITECTURES.keys()
    assert set(UNKNOWN_VECTORS) <= ARCHITECTURES.keys()
    assert {name for name, expected in EXPECTED.items() if not expected} == set(ARCHITECTURES) - set(WITH_BIASES)


@ALL
def test_finds_exactly_the_expected_terms(name):
    model, found = shared(name), find_biases(shared(name))
    expected = {
        row._replace(spans=((0, model.get_parameter(f"{row.module}.{row.parameter}").numel()),))
        if row.spans == WHOLE
        else row
        for row in EXPECTED[name]
    }
    got = {Row(bias.module, bias.parameter, bias.term, bias.layer, bias.stack, bias.spans) for bias in found}
    assert got == expected
    assert len(found) == len(expected), "a bias term is listed twice"


@ALL
def test_counts_whole_parameters(name):
    """The number of parameters, counted on the model instead of on the spans."""
    model = shared(name)
    biases = {f"{row.module}.{row.parameter}": row for row in EXPECTED[name]}
    count = sum(model.get_parameter(place).numel() for place in biases)
    assert sum(bias.num_parameters for bias in find_biases(model)) == count


@pytest.mark.parametrize("name", WITH_BIASES)
def test_select_biases_with_defaults_is_find_biases(name):
    assert select_biases(shared(name)) == find_biases(shared(name))


@ALL
def test_describes_the_parameter_that_is_there(name):
    """Names, shapes and order are those of the stock model, and no weight is taken for a bias."""
    model = shared(name)
    order = {module: index for index, (module, _) in enumerate(model.named_modules())}
    positions = []
    for bias in find_biases(model):
        parameter = model.get_parameter(bias.name)
        assert bias.name == f"{bias.module}.{bias.parameter}"
        assert bias.shape == tuple(parameter.shape)
        assert bias.parameter != "weight"
        assert parameter.ndim == 1 or bias.parameter in ("r_w_bias", "r_r_bias", "r_s_bias")
        assert bias.num_parameters == sum(stop - start for start, stop in bias.spans)
        assert bias.exists
        positions.append(order[bias.module])
    assert positions == sorted(positions), "not in model order"


@pytest.mark.parametrize(("name", "head"), [
    ("bert-sequence", {"classifier"}),
    ("roberta-sequence", {"classifier.dense", "classifier.out_proj"}),
    ("distilbert-sequence", {"pre_classifier", "classifier"}),
    ("deberta-sequence", {"pooler.dense", "classifier"}),
    ("xlnet-sequence", {"sequence_summary.summary", "logits_proj"}),
    ("whisper-audio", {"projector", "classifier"}),
    ("clip-image", {"classifier"}),
])  # fmt: skip
def test_the_head_is_no_bias_term(name, head):
    model = shared(name)
    assert all(model.get_submodule(module).bias is not None for module in head)
    assert not head & {bias.module for bias in find_biases(model)}


@ALL
def test_unknown_vectors(name):
    assert sorted(unknown_vectors(shared(name))) == sorted(UNKNOWN_VECTORS.get(name, set()))


@ALL
def test_looking_changes_nothing(name):
    model = build(name)
    before = snapshot(model)
    find_biases(model), find_biases(model, add_missing_biases=True), unknown_vectors(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["bert-masked_lm", "roberta-masked_lm"])
def test_a_tied_bias_is_found_once(name):
    """Transformers ties the vocabulary's bias to the decoder's: one parameter under two names."""
    model = shared(name)
    names = [key for key, parameter in model.named_parameters(remove_duplicate=False) if parameter.shape == (VOCAB,)]
    assert len(names) == 2
    assert model.get_parameter(names[0]) is model.get_parameter(names[1])
    found = [bias for bias in find_biases(model) if bias.shape == (VOCAB,)]
    assert len(found) == 1
    assert found[0].name.endswith("decoder.bias"), "the decoder is the module that uses it"


def test_biases_tied_by_hand_are_found_once_with_their_other_place():
    model = MLP()
    model.first.bias = model.norm.bias
    found = {bias.name: bias for bias in find_biases(model)}
    assert set(found) == {"first.bias", "second.bias", "batch_norm.bias", "last.bias"}
    assert found["first.bias"].aliases == ("norm.bias",)
    assert found["last.bias"].aliases == ()


def test_a_shared_module_is_found_once():
    """ALBERT's way: the same module under two paths."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert [bias.name for bias in find_biases(model)] == ["0.bias"]


def test_the_root_can_own_a_bias():
    (bias,) = find_biases(nn.Linear(4, 3))
    assert (bias.module, bias.name, bias.term, bias.shape) == ("", "bias", "other", (3,))


def test_a_frozen_bias_is_found_and_a_buffer_is_not():
    model = TrapNet().requires_grad_(False)
    assert {bias.name for bias in find_biases(model)} == {"project.bias", "norm.bias"}


@pytest.mark.parametrize("name", WITH_BIASES)
def test_terms_partition_every_parameter(name):
    """The spans of one parameter's terms do not overlap and leave no gap."""
    covered: dict[str, Counter] = {}
    for bias in find_biases(shared(name)):
        for start, stop in bias.spans:
            assert start < stop
            covered.setdefault(bias.name, Counter()).update(range(start, stop))
    for place, counter in covered.items():
        numel = shared(name).get_parameter(place).numel()
        assert counter == Counter(range(numel)), place


# Published sizes -----------------------------------------------------------------------------------------------------


def meta(class_name: str, config) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, class_name)(config)


def count(model: nn.Module, **kwargs) -> int:
    return sum(bias.num_parameters for bias in select_biases(model, **kwargs))


def test_bert_base_and_large_sizes():
    """The paper's 0.09 % and 0.08 %, and its half: query and intermediate, without the pooler."""
    base = meta("BertForSequenceClassification", transformers.BertConfig())
    assert count(base) == 102_912
    assert count(base, bias_terms="query+intermediate") == 46_080
    assert count(base, bias_terms=["b_q", "b_m2"]) == 46_080
    assert count(base, bias_terms="b_m2") == 12 * 3072
    assert count(base, bias_terms="b_q") == 12 * 768
    large = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    assert count(meta("BertForSequenceClassification", large)) == 272_384


@pytest.mark.parametrize(("class_name", "config", "expected"), [
    # per layer: q k v, attention output, attention norm, intermediate, output, output norm; then the embeddings' norm
    ("RobertaForSequenceClassification", "RobertaConfig", 12 * (5 * 768 + 3072 + 2 * 768) + 768),
    ("DistilBertForSequenceClassification", "DistilBertConfig", 6 * (5 * 768 + 3072 + 2 * 768) + 768),
    # two norms, c_attn, c_proj, c_fc, c_proj; then the final norm
    ("GPT2LMHeadModel", "GPT2Config", 12 * (2 * 768 + 3 * 768 + 768 + 3072 + 768) + 768),
    # q k v o, two norms, two MLP layers; then the patch projection and the final norm
    ("ViTForImageClassification", "ViTConfig", 12 * (4 * 768 + 2 * 768 + 3072 + 768) + 2 * 768),
])  # fmt: skip
def test_base_sizes_by_arithmetic(class_name, config, expected):
    assert count(meta(class_name, getattr(transformers, config)())) == expected


def test_half_of_a_fused_projection_counts_as_half():
    gpt2 = meta("GPT2LMHeadModel", transformers.GPT2Config())
    assert count(gpt2, bias_terms="query") == 12 * 768
    assert count(gpt2, bias_terms=["query", "value"]) == 2 * 12 * 768


# Fused projections, against what the model does with them ------------------------------------------------------------


def _record_states(name: str, model: nn.Module, monkeypatch) -> dict[str, torch.Tensor]:
    """Runs `model` and returns the query, key and value states that its first layer attends with."""
    recorded: list[tuple[torch.Tensor, ...]] = []
    if name.startswith("bloom"):  # has no exchangeable attention function, but a method of its own that splits
        attention = model.transformer.h[0].self_attention
        split = type(attention)._reshape

        def spy(self, fused):
            recorded.append(split(self, fused))
            return recorded[-1]

        monkeypatch.setattr(type(attention), "_reshape", spy)
    else:
        eager = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]

        def probe(module, query, key, value, *args, **kwargs):
            recorded.append((query, key, value))
            return eager(module, query, key, value, *args, **kwargs)

        transformers.AttentionInterface.register("probe", probe)
        monkeypatch.setattr(model.config, "_attn_implementation_internal", "probe")
    with torch.no_grad():
        model(**ARCHITECTURES[name].inputs())
    return dict(zip(QKV, (state.clone() for state in recorded[0]), strict=True))


@pytest.mark.parametrize("term", QKV)
@pytest.mark.parametrize("name", [
    "gpt2-causal_lm", "gpt_neox-causal_lm", "bloom-causal_lm", "modernbert-sequence-biased"
])  # fmt: skip
def test_a_slice_moves_its_own_states_and_no_others(name, term, monkeypatch):
    model = randomize_(build(name))
    before = _record_states(name, model, monkeypatch)
    (fused,) = (bias for bias in find_biases(model) if bias.term == term and bias.layer == 0)
    vector = model.get_parameter(fused.name)
    for start, stop in fused.spans:
        vector.data[start:stop] += 1.0
    after = _record_states(name, model, monkeypatch)
    for state in QKV:
        if state == term:  # every head's part of the slice moved
            moved = (before[state] != after[state]).flatten(-2).any(-1)
            assert moved.all()
        else:
            assert torch.equal(before[state], after[state]), f"the {term} slice moved the {state} states"


@pytest.mark.parametrize("name", ["attention", "torch_encoder"])
def test_slices_of_in_proj_bias_act_as_named(name):
    """Softmax ignores a shift of the keys; a shift of the values leaves the weights and adds `out_proj(shift)`."""
    model = randomize_(build(name))
    x = ARCHITECTURES[name].inputs()["x"]
    attention = next(module for module in model.modules() if isinstance(module, nn.MultiheadAttention))
    slices = {bias.term: bias.spans for bias in find_biases(model) if bias.layer in (0, None) and bias.term in QKV}

    def attend(term: str) -> tuple[torch.Tensor, torch.Tensor]:
        stored = attention.in_proj_bias.data.clone()
        for start, stop in slices.get(term, ()):
            attention.in_proj_bias.data[start:stop] += torch.linspace(-2, 2, stop - start)
        output, weights = attention(x, x, x, need_weights=True)
        attention.in_proj_bias.data.copy_(stored)
        return output, weights

    with torch.no_grad():
        output, weights = attend("none")
        assert not torch.allclose(attend("query")[1], weights, atol=1e-3)
        torch.testing.assert_close(attend("key"), (output, weights))
        shifted, same_weights = attend("value")
        assert torch.equal(same_weights, weights)
        shift = attention.out_proj.weight @ torch.linspace(-2, 2, HIDDEN)
        torch.testing.assert_close(shifted, output + shift)


# Wrapped models ------------------------------------------------------------------------------------------------------


class _Compiled(nn.Module):
    """Holds a model under the name that `torch.compile` gives it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


class _Sharded(nn.Module):
    """Holds a module under the name that FSDP gives it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal_lm", "deberta-sequence", "roberta-sequence"])
def test_paths_are_those_of_the_stock_model(name):
    expected = places(find_biases(shared(name)))
    assert places(find_biases(_Compiled(build(name)))) == expected
    assert places(find_biases(torch.compile(build(name)))) == expected

    sharded = build(name)
    containers = [module for module in sharded.modules() if isinstance(module, nn.ModuleList)]
    assert containers
    for container in containers:
        for index, layer in enumerate(container):
            container[index] = _Sharded(layer)
    assert places(find_biases(sharded)) == expected


def test_a_peft_model_is_looked_through():
    """Injected layers and a head under `modules_to_save`: the same biases under the same stock paths."""
    from peft import LoraConfig, get_peft_model

    expected = places(find_biases(shared("bert-sequence")))
    tuned = get_peft_model(
        build("bert-sequence"),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query", "dense"], modules_to_save=["classifier"]),
    )
    assert places(find_biases(tuned)) == expected
    assert places(find_biases(tuned.base_model.model)) == expected
