"""Which parameter is which of the paper's terms, for every model of the zoo, written down from the modeling files.

[`EXPECTED`] and [`UNKNOWN_VECTORS`] are independent of the tables in `bitfit_hf.terms`, which the tests hold against
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from architectures import HIDDEN

from bitfit_hf.terms import Bias

Spans = tuple[tuple[int, int], ...]
WHOLE = "whole"
QKV = ("query", "key", "value")


class Row(NamedTuple):
    """One expected bias term; `spans` is `WHOLE` where the parameter is not fused."""

    module: str
    parameter: str
    term: str
    layer: int | None
    stack: str
    spans: Spans | str


def places(biases: Iterable[Bias]) -> set[tuple[str, str, str, Spans]]:
    """What identifies each of `biases` within its model."""
    return {(bias.module, bias.parameter, bias.term, bias.spans) for bias in biases}


def thirds(width: int) -> dict[str, Spans]:
    """Query, key and value one after the other, each `width` long."""
    return {term: ((i * width, (i + 1) * width),) for i, term in enumerate(QKV)}


def per_head(heads: int, size: int) -> dict[str, Spans]:
    """Query, key and value side by side within each head."""
    return {
        term: tuple(((3 * head + i) * size, (3 * head + i + 1) * size) for head in range(heads))
        for i, term in enumerate(QKV)
    }


def rows(table: Mapping[str, str | dict[str, Spans]], prefix="", layer: int | None = None, stack="") -> set[Row]:
    """Expands `{"module" or "module:parameter": term, or {term: spans}}`; the parameter is `bias` unless named."""
    found = set()
    for place, terms in table.items():
        module, _, parameter = place.partition(":")
        for term, spans in ({terms: WHOLE} if isinstance(terms, str) else terms).items():
            found.add(Row(prefix + module, parameter or "bias", term, layer, stack, spans))
    return found


def layers(prefix: str, table: Mapping[str, str | dict[str, Spans]], count: int = 2, stack: str = "") -> set[Row]:
    """`table` once for each layer; `{}` in the prefix is the layer's index."""
    return set().union(*(rows(table, prefix.format(i) + ".", i, stack) for i in range(count)))


BERT_LAYER = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_layernorm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_layernorm",
}
# DeBERTa's projections have no bias of their own; the vectors added to them are the biases. The projections of
# relative positions (`pos_*`) see no token, so they are not the paper's query and key.
DEBERTA_LAYER = {place: term for place, term in BERT_LAYER.items() if term not in QKV} | {
    "attention.self:q_bias": "query",
    "attention.self:v_bias": "value",
    "attention.self.pos_q_proj": "other",
}
DEBERTA_V2_LAYER = {place: term for place, term in BERT_LAYER.items() if term not in QKV} | {
    "attention.self.query_proj": "query",
    "attention.self.key_proj": "key",
    "attention.self.value_proj": "value",
    "attention.self.pos_query_proj": "other",
    "attention.self.pos_key_proj": "other",
}
DISTILBERT_LAYER = {
    "attention.q_lin": "query",
    "attention.k_lin": "key",
    "attention.v_lin": "value",
    "attention.out_lin": "attention_output",
    "sa_layer_norm": "attention_layernorm",
    "ffn.lin1": "intermediate",
    "ffn.lin2": "output",
    "output_layer_norm": "output_layernorm",
}
ALBERT_LAYER = {
    "attention.query": "query",
    "attention.key": "key",
    "attention.value": "value",
    "attention.dense": "attention_output",
    "attention.LayerNorm": "attention_layernorm",
    "ffn": "intermediate",
    "ffn_output": "output",
    "full_layer_layer_norm": "output_layernorm",
}
MPNET_LAYER = {
    "attention.attn.q": "query",
    "attention.attn.k": "key",
    "attention.attn.v": "value",
    "attention.attn.o": "attention_output",
    "attention.LayerNorm": "attention_layernorm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_layernorm",
}
MODERNBERT_LAYER = {
    "attn.Wqkv": thirds(HIDDEN),
    "attn.Wo": "attention_output",
    "mlp_norm": "output_layernorm",
    "mlp.Wi": "intermediate",  # input and gate in one projection, both of them `intermediate`
    "mlp.Wo": "output",
}
GPT2_LAYER = {
    "ln_1": "attention_layernorm",
    "attn.c_attn": thirds(HIDDEN),
    "attn.c_proj": "attention_output",
    "ln_2": "output_layernorm",
    "mlp.c_fc": "intermediate",
    "mlp.c_proj": "output",
}
NEOX_LAYER = {
    "input_layernorm": "attention_layernorm",
    "post_attention_layernorm": "output_layernorm",
    "attention.query_key_value": per_head(4, HIDDEN // 4),
    "attention.dense": "attention_output",
    "mlp.dense_h_to_4h": "intermediate",
    "mlp.dense_4h_to_h": "output",
}
BLOOM_LAYER = {place.replace("attention.", "self_attention."): term for place, term in NEOX_LAYER.items()}
SELF_ATTENTION = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.out_proj": "attention_output",
}
CROSS_ATTENTION = {
    "encoder_attn.q_proj": "query",
    "encoder_attn.k_proj": "key",
    "encoder_attn.v_proj": "value",
    "encoder_attn.out_proj": "attention_output",
    "encoder_attn_layer_norm": "attention_layernorm",
}
BART_LAYER = SELF_ATTENTION | {
    "self_attn_layer_norm": "attention_layernorm",
    "fc1": "intermediate",
    "fc2": "output",
    "final_layer_norm": "output_layernorm",
}
BART_DECODER_LAYER = BART_LAYER | CROSS_ATTENTION
# Whisper's key projections have no bias.
WHISPER_LAYER = {place: term for place, term in BART_LAYER.items() if term != "key"}
WHISPER_DECODER_LAYER = {place: term for place, term in BART_DECODER_LAYER.items() if term != "key"}
CLIP_LAYER = SELF_ATTENTION | {
    "layer_norm1": "attention_layernorm",
    "layer_norm2": "output_layernorm",
    "mlp.fc1": "intermediate",
    "mlp.fc2": "output",
}
LLAMA_LAYER = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "attention_output",
    "mlp.gate_proj": "intermediate",
    "mlp.up_proj": "intermediate",
    "mlp.down_proj": "output",
}
QWEN2_LAYER = {place: term for place, term in LLAMA_LAYER.items() if term in QKV}
VIT_LAYER = {
    "attention.q_proj": "query",
    "attention.k_proj": "key",
    "attention.v_proj": "value",
    "attention.o_proj": "attention_output",
    "layernorm_before": "attention_layernorm",
    "layernorm_after": "output_layernorm",
    "mlp.fc1": "intermediate",
    "mlp.fc2": "output",
}
BEIT_LAYER = {place: term for place, term in VIT_LAYER.items() if term != "key"}
# Vectors of shape [n_head, d_head] that are added to the query: for content, for position, for segment.
XLNET_LAYER = {
    "rel_attn:r_w_bias": "query",
    "rel_attn:r_r_bias": "query",
    "rel_attn:r_s_bias": "query",
    "rel_attn.layer_norm": "attention_layernorm",
    "ff.layer_1": "intermediate",
    "ff.layer_2": "output",
    "ff.layer_norm": "output_layernorm",
}
TORCH_LAYER = {
    "self_attn:in_proj_bias": thirds(HIDDEN),
    "self_attn.out_proj": "attention_output",
    "linear1": "intermediate",
    "linear2": "output",
    "norm1": "attention_layernorm",
    "norm2": "output_layernorm",
}


def bert_like(prefix: str, layer: Mapping, *, pooler: bool) -> set[Row]:
    outside = {"embeddings.LayerNorm": "embedding_layernorm"} | ({"pooler.dense": "pooler"} if pooler else {})
    return rows(outside, prefix) | layers(prefix + "encoder.layer.{}", layer)


def bart_like(layer: Mapping, decoder_layer: Mapping, prefix: str, outside: Mapping[str, str]) -> set[Row]:
    """The stacks `encoder` and `decoder`; `outside` is what both have beside their layers."""
    found = set()
    for stack, table in (("encoder", layer), ("decoder", decoder_layer)):
        found |= layers(f"{prefix}{stack}.layers.{{}}", table, stack=stack) | rows(
            outside, f"{prefix}{stack}.", stack=stack
        )
    return found


def clip_tower(name: str, outside: Mapping[str, str], stack: str) -> set[Row]:
    return layers(f"{name}_model.encoder.layers.{{}}", CLIP_LAYER, stack=stack) | rows(
        outside, f"{name}_model.", stack=stack
    )


_BERT = bert_like("bert.", BERT_LAYER, pooler=True)
_BERT_NO_POOLER = bert_like("bert.", BERT_LAYER, pooler=False)
_ROBERTA = bert_like("roberta.", BERT_LAYER, pooler=False)
_ROBERTA_LM = {"lm_head.dense": "lm_head", "lm_head.layer_norm": "lm_head", "lm_head.decoder": "lm_head"}
_DISTILBERT = rows({"distilbert.embeddings.LayerNorm": "embedding_layernorm"}) | layers(
    "distilbert.transformer.layer.{}", DISTILBERT_LAYER
)
_ALBERT_OUTSIDE = {
    "embeddings.LayerNorm": "embedding_layernorm",
    "encoder.embedding_hidden_mapping_in": "other",
    "pooler": "pooler",
}
_GPT2 = layers("transformer.h.{}", GPT2_LAYER) | rows({"transformer.ln_f": "other"})
_VIT_OUTSIDE = {"embeddings.patch_embeddings.projection": "other", "layernorm": "other"}
_WHISPER_OUTSIDE = {"conv1": "other", "conv2": "other", "layer_norm": "other"}
_CLIP_VISION_OUTSIDE = {"pre_layrnorm": "embedding_layernorm", "post_layernorm": "other"}

EXPECTED: dict[str, set[Row]] = {
    "bert-sequence": _BERT,
    "bert-token": _BERT_NO_POOLER,
    "bert-question": _BERT_NO_POOLER,
    "bert-choice": _BERT,
    # `cls.predictions.bias` is the same parameter as the decoder's, which is the one that is used.
    "bert-masked_lm": _BERT_NO_POOLER
    | rows(
        {
            "cls.predictions.transform.dense": "lm_head",
            "cls.predictions.transform.LayerNorm": "lm_head",
            "cls.predictions.decoder": "lm_head",
        }
    ),
    "bert-backbone": bert_like("", BERT_LAYER, pooler=True),
    "roberta-sequence": _ROBERTA,
    "roberta-token": _ROBERTA,
    "roberta-masked_lm": _ROBERTA | rows(_ROBERTA_LM),
    "xlm_roberta-sequence": _ROBERTA,
    "distilbert-sequence": _DISTILBERT,
    "distilbert-masked_lm": _DISTILBERT
    | rows({"vocab_transform": "lm_head", "vocab_layer_norm": "lm_head", "vocab_projector": "lm_head"}),
    "electra-sequence": bert_like("electra.", BERT_LAYER, pooler=False)
    | rows({"electra.embeddings_project": "other"}),
    "albert-sequence": rows(_ALBERT_OUTSIDE, "albert.")
    | layers("albert.encoder.albert_layer_groups.0.albert_layers.{}", ALBERT_LAYER, count=1),
    # Two groups of two layers: the index runs on across groups.
    "albert-backbone-groups": rows(_ALBERT_OUTSIDE).union(
        *(
            rows(ALBERT_LAYER, f"encoder.albert_layer_groups.{group}.albert_layers.{inner}.", layer=2 * group + inner)
            for group in range(2)
            for inner in range(2)
        )
    ),
    "deberta-sequence": bert_like("deberta.", DEBERTA_LAYER, pooler=False),
    "deberta_v2-sequence": bert_like("deberta.", DEBERTA_V2_LAYER, pooler=False)
    | rows({"LayerNorm": "other", "conv.conv": "other", "conv.LayerNorm": "other"}, "deberta.encoder."),
    "mpnet-sequence": bert_like("mpnet.", MPNET_LAYER, pooler=False),
    "modernbert-sequence": set(),
    # The first layer has no attention norm: the embeddings' norm stands before it.
    "modernbert-sequence-biased": layers("model.layers.{}", MODERNBERT_LAYER)
    | rows({"attn_norm": "attention_layernorm"}, "model.layers.1.", layer=1)
    | rows({"model.embeddings.norm": "embedding_layernorm", "model.final_norm": "other"}),
    "modernbert-masked_lm": rows({"decoder": "lm_head"}),
    "gpt2-causal_lm": _GPT2,
    "gpt2-sequence": _GPT2,
    "gpt_neox-causal_lm": layers("gpt_neox.layers.{}", NEOX_LAYER) | rows({"gpt_neox.final_layer_norm": "other"}),
    "opt-causal_lm": layers("model.decoder.layers.{}", BART_LAYER) | rows({"model.decoder.final_layer_norm": "other"}),
    "bloom-causal_lm": layers("transformer.h.{}", BLOOM_LAYER)
    | rows({"transformer.word_embeddings_layernorm": "embedding_layernorm", "transformer.ln_f": "other"}),
    "qwen2-causal_lm": layers("model.layers.{}", QWEN2_LAYER),
    "llama-causal_lm": set(),
    "llama-sequence": set(),
    "llama-causal_lm-biased": layers("model.layers.{}", LLAMA_LAYER),
    "mamba-causal_lm": layers("backbone.layers.{}", {"mixer.conv1d": "other", "mixer.dt_proj": "other"}),
    "mamba2-causal_lm": layers("backbone.layers.{}", {"mixer.conv1d": "other"}),
    "t5-seq2seq_lm": set(),
    "t5-seq2seq_lm-gated": set(),
    "t5-sequence": set(),
    "t5-token": set(),
    "t5-question": set(),
    "xlnet-sequence": layers("transformer.layer.{}", XLNET_LAYER),
    "bart-seq2seq_lm": bart_like(
        BART_LAYER, BART_DECODER_LAYER, "model.", {"layernorm_embedding": "embedding_layernorm"}
    ),
    "bart-sequence": bart_like(
        BART_LAYER, BART_DECODER_LAYER, "model.", {"layernorm_embedding": "embedding_layernorm"}
    ),
    "vit-image": layers("vit.layers.{}", VIT_LAYER) | rows(_VIT_OUTSIDE, "vit."),
    "vit-backbone": layers("layers.{}", VIT_LAYER) | rows(_VIT_OUTSIDE | {"pooler.dense": "pooler"}),
    "beit-image": layers("beit.layers.{}", BEIT_LAYER)
    | rows({"embeddings.patch_embeddings.projection": "other", "pooler.layernorm": "pooler"}, "beit."),
    # Stages of one and two blocks: the index runs on across stages.
    "swin-image": rows(
        {
            "embeddings.patch_embeddings.projection": "other",
            "embeddings.norm": "embedding_layernorm",
            "encoder.layers.0.downsample.norm": "other",
            "layernorm": "other",
        },
        "swin.",
    ).union(
        *(
            rows(VIT_LAYER, f"swin.encoder.layers.{place}.", layer=index)
            for index, place in enumerate(["0.blocks.0", "1.blocks.0", "1.blocks.1"])
        )
    ),
    "whisper-seq2seq_lm": bart_like(WHISPER_LAYER, WHISPER_DECODER_LAYER, "model.", {"layer_norm": "other"})
    | rows({"conv1": "other", "conv2": "other"}, "model.encoder.", stack="encoder"),
    "whisper-audio": layers("encoder.layers.{}", WHISPER_LAYER) | rows(_WHISPER_OUTSIDE, "encoder."),
    "whisper-audio-weighted": layers("encoder.layers.{}", WHISPER_LAYER) | rows(_WHISPER_OUTSIDE, "encoder."),
    "clip-contrastive": clip_tower("text", {"final_layer_norm": "other"}, "text")
    | clip_tower("vision", _CLIP_VISION_OUTSIDE, "vision"),
    "clip-image": clip_tower("vision", _CLIP_VISION_OUTSIDE, ""),
    # Modules that no table knows: everything that is a bias by its kind, as `other`.
    "mlp": rows(dict.fromkeys(("first", "norm", "second", "batch_norm", "last"), "other")),
    "convnet": rows(dict.fromkeys(("conv3d", "group_norm", "conv2d", "conv1d"), "other")),
    "attention": rows(
        {"attention:in_proj_bias": thirds(HIDDEN), "attention.out_proj": "attention_output", "head": "other"}
    ),
    "torch_encoder": layers("encoder.layers.{}", TORCH_LAYER),
    "bias_free": set(),
    "traps": rows({"project": "other", "norm": "other"}),
}

# Vectors that are no bias terms: scales, tables, embeddings, a router's steering. `bitfit inspect` lists them.
UNKNOWN_VECTORS = {
    "mamba-causal_lm": {f"backbone.layers.{i}.mixer.D" for i in range(2)},
    "mamba2-causal_lm": {f"backbone.layers.{i}.mixer.{name}" for i in range(2) for name in ("A_log", "D", "dt_bias")},
    "beit-image": {f"beit.layers.{i}.lambda_{j}" for i in range(2) for j in (1, 2)},
    "clip-contrastive": {"vision_model.embeddings.class_embedding"},
    "clip-image": {"vision_model.embeddings.class_embedding"},
    "traps": {"layer_scale", "gate_bias_scale", "router.expert_bias"},
}
