"""Narrowing the bias terms by options, adding missing ones, and the one clear error where nothing is left."""

from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, HIDDEN, INTERMEDIATE, shared, snapshot
from expected_terms import BERT_LAYER, EXPECTED, LLAMA_LAYER, QWEN2_LAYER, Row, layers, places, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitfit_hf.errors import BitFitError, NoBiasesError, NoMatchError, UnknownTermError
from bitfit_hf.terms import SYMBOLS, TERMS, Bias, find_biases, resolve_terms, select_biases

# One of each way in which biases are laid out, for the properties.
VARIED = [
    "bert-sequence",
    "gpt_neox-causal_lm",
    "bart-seq2seq_lm",
    "xlnet-sequence",
    "deberta-sequence",
    "torch_encoder",
]


# Narrowing -----------------------------------------------------------------------------------------------------------


def selected(name: str = "bert-sequence", **kwargs) -> set[str]:
    return {bias.name for bias in select_biases(shared(name), **kwargs)}


def test_target_modules_narrow_by_suffix_or_pattern():
    queries = {f"bert.encoder.layer.{i}.attention.self.query.bias" for i in range(2)}
    assert selected(target_modules=["query"]) == queries
    assert selected(target_modules=["self.query"]) == queries
    assert selected(target_modules=["bert.encoder.layer.1.attention.self.query"]) == {max(queries)}
    assert selected(target_modules=r".*\.1\..*query") == {max(queries)}
    assert selected(target_modules=["query", "pooler.dense"]) == queries | {"bert.pooler.dense.bias"}


def test_targets_match_whole_names():
    """`dense` is not a suffix of `xdense`, and `ery` is none of `query`."""
    with pytest.raises(NoMatchError):
        selected(target_modules=["ery"])


def test_exclude_modules_remove():
    everything = selected()
    assert selected(exclude_modules=["query"]) == {name for name in everything if not name.endswith("query.bias")}
    assert selected(exclude_modules=r".*encoder.*") == {"bert.embeddings.LayerNorm.bias", "bert.pooler.dense.bias"}


def test_layers_to_transform():
    for wanted in (1, [1]):
        chosen = select_biases(shared("bert-sequence"), layers_to_transform=wanted)
        assert {bias.layer for bias in chosen} == {1}
        assert len(chosen) == len(BERT_LAYER)
    both = select_biases(shared("bart-seq2seq_lm"), layers_to_transform=[0])
    assert {(bias.stack, bias.layer) for bias in both} == {("encoder", 0), ("decoder", 0)}


def test_everything_narrows_together():
    assert selected(bias_terms=["query", "key"], layers_to_transform=[0], exclude_modules=["key"]) == {
        "bert.encoder.layer.0.attention.self.query.bias"
    }


def test_modules_to_save_are_trained_whole_and_so_no_bias_terms():
    assert "bert.pooler.dense.bias" in selected()
    assert selected() - selected(modules_to_save=["pooler"]) == {"bert.pooler.dense.bias"}
    assert "last.bias" not in selected("mlp", modules_to_save=["last"])


def test_a_target_may_be_a_free_standing_vector_s_module():
    assert selected("deberta-sequence", target_modules=["attention.self"]) == {
        f"deberta.encoder.layer.{i}.attention.self.{vector}" for i in range(2) for vector in ("q_bias", "v_bias")
    }


# Missing biases ------------------------------------------------------------------------------------------------------


def added(name: str, **kwargs) -> set[tuple[str, str, int | None]]:
    return {
        (bias.module, bias.term, bias.layer)
        for bias in select_biases(shared(name), add_missing_biases=True, **kwargs)
        if not bias.exists
    }


def as_added(*groups: set[Row]) -> set[tuple[str, str, int | None]]:
    return {(row.module, row.term, row.layer) for row in set().union(*groups)}


def test_every_projection_of_a_bias_free_model_gets_a_bias():
    """Projections, not norms, not the LM head, not the embeddings."""
    assert added("llama-causal_lm") == as_added(layers("model.layers.{}", LLAMA_LAYER))
    assert added("llama-sequence") == as_added(layers("model.layers.{}", LLAMA_LAYER)), "nothing of the head"
    assert added("bias_free") == as_added(rows({"up": "other", "down": "other"}))


def test_added_biases_have_the_projection_s_width():
    shapes = {bias.module: bias.shape for bias in find_biases(shared("llama-causal_lm"), add_missing_biases=True)}
    assert shapes["model.layers.0.self_attn.q_proj"] == (HIDDEN,)
    assert shapes["model.layers.0.self_attn.k_proj"] == (HIDDEN // 2,), "two key heads of four"
    assert shapes["model.layers.0.mlp.up_proj"] == (INTERMEDIATE,)
    (query,) = select_biases(
        shared("llama-causal_lm"), bias_terms="query", layers_to_transform=0, add_missing_biases=True
    )
    assert (query.parameter, query.spans, query.num_parameters, query.exists) == (
        "bias",
        ((0, HIDDEN),),
        HIDDEN,
        False,
    )


def test_only_what_is_missing_is_added():
    """Qwen2 has biases on q, k and v."""
    missing = {place: term for place, term in LLAMA_LAYER.items() if place not in QWEN2_LAYER}
    assert added("qwen2-causal_lm") == as_added(layers("model.layers.{}", missing))
    existing = {bias.module for bias in find_biases(shared("qwen2-causal_lm"), add_missing_biases=True) if bias.exists}
    assert existing == {row.module for row in EXPECTED["qwen2-causal_lm"]}
    whisper = dict.fromkeys(("self_attn.k_proj", "encoder_attn.k_proj"), "key")
    assert added("whisper-seq2seq_lm", bias_terms="key", target_modules=r".*decoder.*") == as_added(
        layers("model.decoder.layers.{}", whisper)
    )


def test_norms_and_lm_head_get_one_only_when_named():
    norms = {"input_layernorm": "attention_layernorm", "post_attention_layernorm": "output_layernorm"}
    assert added("llama-causal_lm", bias_terms=["attention_layernorm", "output_layernorm"]) == as_added(
        layers("model.layers.{}", norms)
    )
    assert added("llama-causal_lm", bias_terms="lm_head") == {("lm_head", "lm_head", None)}
    assert added("llama-causal_lm", bias_terms=["query", "lm_head"], layers_to_transform=None) == as_added(
        layers("model.layers.{}", {"self_attn.q_proj": "query"})
    ) | {("lm_head", "lm_head", None)}


@pytest.mark.parametrize(("name", "feed_forward"), [
    ("t5-seq2seq_lm", {"DenseReluDense.wi": "intermediate", "DenseReluDense.wo": "output"}),
    ("t5-seq2seq_lm-gated", {
        "DenseReluDense.wi_0": "intermediate", "DenseReluDense.wi_1": "intermediate", "DenseReluDense.wo": "output",
    }),
])  # fmt: skip
def test_t5_layers_with_added_biases(name, feed_forward):
    """Cross-attention counts with attention; the relative position table gets nothing."""
    attention = {"q": "query", "k": "key", "v": "value", "o": "attention_output"}
    encoder = {f"layer.0.SelfAttention.{place}": term for place, term in attention.items()}
    decoder = encoder | {f"layer.1.EncDecAttention.{place}": term for place, term in attention.items()}
    encoder |= {f"layer.1.{place}": term for place, term in feed_forward.items()}
    decoder |= {f"layer.2.{place}": term for place, term in feed_forward.items()}
    assert added(name) == as_added(layers("encoder.block.{}", encoder), layers("decoder.block.{}", decoder))


# Errors --------------------------------------------------------------------------------------------------------------


def refused(error: type[BitFitError], model: nn.Module, **kwargs) -> str:
    """The message of the one clear error that `select_biases` raises, with the model left as it was."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        select_biases(model, **kwargs)
    assert snapshot(model) == before
    assert isinstance(caught.value, ValueError), "a caller who does not know this library catches ValueError"
    return str(caught.value)


@pytest.mark.parametrize(
    ("typo", "meant"), [("qury", "query"), ("atention_output", "attention_output"), ("b_ln1", "b_LN1")]
)
def test_unknown_term(typo, meant):
    message = refused(UnknownTermError, shared("bert-sequence"), bias_terms=["value", typo])
    assert repr(typo) in message or f"`{typo}`" in message
    assert meant in message
    assert all(term in message for term in TERMS), "lists what is valid"


def test_all_unknown_terms_are_named_at_once():
    message = refused(UnknownTermError, shared("bert-sequence"), bias_terms=["bogus", "query", "nonsense"])
    assert "bogus" in message
    assert "nonsense" in message


@pytest.mark.parametrize(
    "terms", [3, None, 1.5, True, [], "", ["query", 3], [None], {"query": 1}, [["query"]], b"query"]
)
def test_terms_of_the_wrong_type(terms):
    message = refused(BitFitError, shared("bert-sequence"), bias_terms=terms)
    assert "bias_terms" in message


@pytest.mark.parametrize("name", [name for name, arch in ARCHITECTURES.items() if arch.bias_free])
def test_no_biases_names_the_remedy(name):
    message = refused(NoBiasesError, shared(name))
    assert type(shared(name)).__name__ in message
    assert "add_missing_biases=True" in message


def test_a_term_that_the_model_does_not_have():
    message = refused(NoBiasesError, shared("bert-token"), bias_terms="pooler")
    assert "pooler" in message
    assert "BertForTokenClassification" in message
    assert "query" in message, "says which terms there are"
    assert "add_missing_biases" not in message, "no option brings the pooler back"


def test_a_term_whose_projections_have_no_bias_names_the_remedy():
    message = refused(NoBiasesError, shared("qwen2-causal_lm"), bias_terms="output")
    assert "output" in message
    assert "add_missing_biases=True" in message


@pytest.mark.parametrize(("option", "value"), [
    ("target_modules", ["no_such_module"]),
    ("target_modules", "no_such_module"),
    ("exclude_modules", ["no_such_module"]),
    ("layers_to_transform", [7]),
    ("layers_to_transform", 7),
    ("modules_to_save", ["no_such_module"]),
])  # fmt: skip
def test_an_option_that_matches_nothing(option, value):
    message = refused(NoMatchError, shared("bert-sequence"), **{option: value})
    assert option in message
    assert ("7" if option == "layers_to_transform" else "no_such_module") in message


def test_options_that_leave_nothing_together():
    options = {"bias_terms": "query", "target_modules": ["query"], "exclude_modules": ["attention.self.query"]}
    message = refused(NoMatchError, shared("bert-sequence"), **options)
    assert "exclude_modules" in message
    assert "target_modules" in message


def test_layers_of_a_model_without_layers():
    message = refused(NoMatchError, shared("mlp"), layers_to_transform=[0])
    assert "layers_to_transform" in message


@pytest.mark.parametrize("options", [
    {"target_modules": 3},
    {"target_modules": [3]},
    {"exclude_modules": {"query": True}},
    {"layers_to_transform": "0"},
    {"layers_to_transform": [0.5]},
    {"layers_to_transform": True},
    {"modules_to_save": 5},
    {"target_modules": "("},
])  # fmt: skip
def test_options_of_the_wrong_type(options):
    message = refused(BitFitError, shared("bert-sequence"), **options)
    assert next(iter(options)) in message


# Properties ----------------------------------------------------------------------------------------------------------

some_terms = st.lists(st.sampled_from(TERMS), min_size=1, max_size=len(TERMS), unique=True)
some_model = st.sampled_from(VARIED)
quick = settings(max_examples=60, deadline=None)


def select_or_none(name: str, **kwargs) -> list[Bias]:
    """The selection, or nothing where an empty one is refused."""
    try:
        return select_biases(shared(name), **kwargs)
    except (NoBiasesError, NoMatchError):
        return []


@quick
@given(name=some_model, terms=some_terms)
def test_terms_select_exactly_their_own(name, terms):
    everything = find_biases(shared(name))
    wanted = [bias for bias in everything if bias.term in terms]
    assert select_or_none(name, bias_terms=terms) == wanted
    rest = [term for term in TERMS if term not in terms]
    others = select_or_none(name, bias_terms=rest) if rest else []
    assert places(wanted) | places(others) == places(everything)
    assert not places(wanted) & places(others)


@quick
@given(name=some_model, terms=some_terms, data=st.data())
def test_the_order_and_spelling_of_terms_do_not_matter(name, terms, data):
    shuffled = data.draw(st.permutations(terms))
    spelled = [data.draw(st.sampled_from([term, SYMBOLS[term]])) for term in shuffled]
    assert resolve_terms(spelled) == resolve_terms(terms) == tuple(term for term in TERMS if term in terms)
    assert select_or_none(name, bias_terms=spelled) == select_or_none(name, bias_terms=terms)


@quick
@given(name=some_model, data=st.data())
def test_target_and_exclude_are_complements(name, data):
    everything = find_biases(shared(name))
    modules = sorted({bias.module for bias in everything})
    chosen = data.draw(st.lists(st.sampled_from(modules), min_size=1, unique=True))
    targeted = select_or_none(name, target_modules=chosen)
    remaining = select_or_none(name, exclude_modules=chosen)
    assert {bias.module for bias in targeted} == set(chosen)
    assert sorted(places(targeted) | places(remaining)) == sorted(places(everything))
    assert not places(targeted) & places(remaining)
    assert select_or_none(name, target_modules=chosen, exclude_modules=chosen) == []


@quick
@given(name=some_model, terms=some_terms, indices=st.lists(st.integers(0, 1), min_size=1, unique=True))
def test_layers_and_terms_intersect(name, terms, indices):
    wanted = [bias for bias in find_biases(shared(name)) if bias.term in terms and bias.layer in indices]
    assert select_or_none(name, bias_terms=terms, layers_to_transform=indices) == wanted
