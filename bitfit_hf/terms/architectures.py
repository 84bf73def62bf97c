"""Where the bias terms live in each family of architectures: the tables.

[`Family`] says how paths are matched. Selection never goes by these names: they only *name* what [`find_biases`] has
found by its structure, and list the vectors that have no module of their own (`free`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from . import fused
from .family import Family

# --- layers that families share --------------------------------------------------------------------------------------

_BERT_LAYER = {
    "attention|crossattention.self.query": "query",
    "attention|crossattention.self.key": "key",
    "attention|crossattention.self.value": "value",
    "attention|crossattention.output.dense": "attention_output",
    "attention|crossattention.output.LayerNorm": "attention_layernorm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_layernorm",
}
# RoBERTa-XL, RoBERTa-PreLayerNorm, Megatron-BERT and ESM norm before each block, under names of their own.
_PRE_NORM_BERT_LAYER = {
    **_BERT_LAYER,
    "attention|crossattention.LayerNorm|ln|self_attn_layer_norm": "attention_layernorm",
    "LayerNorm|ln": "output_layernorm",
    "intermediate.LayerNorm": "output_layernorm",
}
_LLAMA_LAYER = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj|dense|out_proj": "attention_output",
    "mlp.gate_proj|up_proj|gate_up_proj|fc1|c_fc|dense_h_to_4h": "intermediate",
    "mlp.shared_expert|shared_experts|shared_mlp.gate_proj|up_proj": "intermediate",
    "mlp.down_proj|fc2|c_proj|dense_4h_to_h": "output",
    "mlp.shared_expert|shared_experts|shared_mlp.down_proj": "output",
    "input_layernorm": "attention_layernorm",
    "post_attention_layernorm": "output_layernorm",
}
# Norms before and after each block (Gemma 2), or after each block only (OLMo 2).
_SANDWICH_LLAMA_LAYER = {
    **_LLAMA_LAYER,
    "post_attention_layernorm": "attention_layernorm",
    "pre_feedforward_layernorm|post_feedforward_layernorm": "output_layernorm",
}
_BART_LAYER = {
    "self_attn|encoder_attn.q_proj": "query",
    "self_attn|encoder_attn.k_proj": "key",
    "self_attn|encoder_attn.v_proj": "value",
    "self_attn|encoder_attn.out_proj": "attention_output",
    "self_attn_layer_norm|encoder_attn_layer_norm": "attention_layernorm",
    "fc1": "intermediate",
    "fc2": "output",
    "final_layer_norm": "output_layernorm",
}
_T5_ATTENTION = {
    "layer.*.SelfAttention|LocalSelfAttention|TransientGlobalSelfAttention|EncDecAttention.q": "query",
    "layer.*.SelfAttention|LocalSelfAttention|TransientGlobalSelfAttention|EncDecAttention.k": "key",
    "layer.*.SelfAttention|LocalSelfAttention|TransientGlobalSelfAttention|EncDecAttention.v": "value",
    "layer.*.SelfAttention|LocalSelfAttention|TransientGlobalSelfAttention|EncDecAttention.o": "attention_output",
    "layer.*.DenseReluDense.wi|wi_0|wi_1": "intermediate",
    "layer.*.DenseReluDense.wo": "output",
}
_VIT_LAYER = {
    "attention.q_proj": "query",
    "attention.k_proj": "key",
    "attention.v_proj": "value",
    "attention.o_proj": "attention_output",
    "layernorm_before|norm1": "attention_layernorm",
    "mlp.fc1|weights_in": "intermediate",
    "mlp.fc2|weights_out": "output",
    "layernorm_after|norm2": "output_layernorm",
}
_OLD_VIT_LAYER = {
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "attention.output.dense": "attention_output",
    "layernorm_before": "attention_layernorm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "layernorm_after": "output_layernorm",
}
_CLIP_LAYER = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.out_proj|projection": "attention_output",
    "layer_norm1": "attention_layernorm",
    "mlp.fc1": "intermediate",
    "mlp.fc2": "output",
    "layer_norm2": "output_layernorm",
}
_GPT_LAYER = {
    "ln_1|ln_cross_attn": "attention_layernorm",
    "attn.q_proj": "query",
    "attn.k_proj": "key",
    "attn.v_proj": "value",
    "attn.attention.q_proj": "query",
    "attn.attention.k_proj": "key",
    "attn.attention.v_proj": "value",
    "attn.attention.out_proj": "attention_output",
    "crossattention.q_attn": "query",
    "attn|crossattention.c_proj|out_proj": "attention_output",
    "ln_2": "output_layernorm",
    "mlp.c_fc|fc_in": "intermediate",
    "mlp.c_proj|fc_out": "output",
}
_NEOX_LAYER = {
    "attention|self_attention|self_attn.dense": "attention_output",
    "input_layernorm|ln_attn": "attention_layernorm",
    "mlp.dense_h_to_4h": "intermediate",
    "mlp.dense_4h_to_h": "output",
    "post_attention_layernorm|ln_mlp": "output_layernorm",
}
_BERT_OUTSIDE = {"embeddings.LayerNorm": "embedding_layernorm", "pooler.dense": "pooler"}

# --- the families ----------------------------------------------------------------------------------------------------

_FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=(
            *("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text", "ernie", "ibert", "xmod"),
            *("layoutlm", "layoutlmv3", "rembert", "roc_bert", "roformer", "bert-generation", "convbert"),
            *("nystromformer", "splinter", "big_bird", "longformer", "lilt", "luke", "mobilebert"),
        ),
        blocks={
            "encoder.layer.*": {
                **_BERT_LAYER,
                "attention.self.query_global|w2e_query|e2w_query|e2e_query": "query",
                "attention.self.key_global": "key",
                "attention.self.value_global": "value",
                "ffn.*.intermediate.dense": "intermediate",
                "ffn.*.output.dense": "output",
                "ffn.*.output.LayerNorm": "output_layernorm",
            }
        },
        outside={**_BERT_OUTSIDE, "pooler": "pooler"},
        lm_head=("cls.predictions", "lm_head", "generator_predictions", "generator_lm_head", "entity_predictions"),
        free={"entity_predictions.bias": "lm_head"},
    ),
    Family(
        model_types=("xlm-roberta-xl", "roberta-prelayernorm", "megatron-bert"),
        blocks={"encoder.layer.*": _PRE_NORM_BERT_LAYER},
        outside=_BERT_OUTSIDE,
        lm_head=("cls.predictions", "lm_head"),
    ),
    Family(
        model_types=("esm",),
        blocks={"encoder.layer.*": _PRE_NORM_BERT_LAYER},
        outside=_BERT_OUTSIDE,
        lm_head=("lm_head",),
        free={"lm_head.bias": "lm_head"},
    ),
    Family(
        model_types=("deberta",),
        blocks={"encoder.layer.*": _BERT_LAYER},
        outside=_BERT_OUTSIDE,
        lm_head=("cls.predictions", "lm_predictions"),
        fused={"attention.self.in_proj": fused.per_head_key},
        free={"attention.self.q_bias": "query", "attention.self.v_bias": "value"},
    ),
    Family(
        model_types=("deberta-v2",),
        blocks={
            "encoder.layer.*": {
                **_BERT_LAYER,
                "attention.self.query_proj": "query",
                "attention.self.key_proj": "key",
                "attention.self.value_proj": "value",
            }
        },
        outside=_BERT_OUTSIDE,
        lm_head=("cls.predictions", "lm_predictions"),
    ),
    Family(
        model_types=("distilbert",),
        blocks={
            "transformer.layer.*": {
                "attention.q_lin": "query",
                "attention.k_lin": "key",
                "attention.v_lin": "value",
                "attention.out_lin": "attention_output",
                "sa_layer_norm": "attention_layernorm",
                "ffn.lin1": "intermediate",
                "ffn.lin2": "output",
                "output_layer_norm": "output_layernorm",
            }
        },
        outside={"embeddings.LayerNorm": "embedding_layernorm"},
        lm_head=("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ),
    Family(
        model_types=("albert",),
        blocks={
            "encoder.albert_layer_groups.*.albert_layers.*": {
                "attention.query": "query",
                "attention.key": "key",
                "attention.value": "value",
                "attention.dense": "attention_output",
                "attention.LayerNorm": "attention_layernorm",
                "ffn": "intermediate",
                "ffn_output": "output",
                "full_layer_layer_norm": "output_layernorm",
            }
        },
        outside={"embeddings.LayerNorm": "embedding_layernorm", "pooler": "pooler"},
        lm_head=("predictions",),
    ),
    Family(
        model_types=("mpnet",),
        blocks={
            "encoder.layer.*": {
                "attention.attn.q": "query",
                "attention.attn.k": "key",
                "attention.attn.v": "value",
                "attention.attn.o": "attention_output",
                "attention.LayerNorm": "attention_layernorm",
                "intermediate.dense": "intermediate",
                "output.dense": "output",
                "output.LayerNorm": "output_layernorm",
            }
        },
        outside=_BERT_OUTSIDE,
        lm_head=("lm_head",),
    ),
    Family(
        model_types=("squeezebert",),
        blocks={
            "encoder.layers.*": {
                "attention.query": "query",
                "attention.key": "key",
                "attention.value": "value",
                "post_attention.conv1d": "attention_output",
                "post_attention.layernorm": "attention_layernorm",
                "intermediate.conv1d": "intermediate",
                "output.conv1d": "output",
                "output.layernorm": "output_layernorm",
            }
        },
        outside=_BERT_OUTSIDE,
        lm_head=("cls.predictions",),
    ),
    Family(
        model_types=("modernbert",),
        blocks={
            "layers.*": {
                "attn_norm": "attention_layernorm",
                "attn.Wo": "attention_output",
                "mlp_norm": "output_layernorm",
                "mlp.Wi": "intermediate",
                "mlp.Wo": "output",
            }
        },
        outside={"embeddings.norm": "embedding_layernorm"},
        lm_head=("head", "decoder"),
        fused={"attn.Wqkv": fused.thirds},
    ),
    Family(
        model_types=("xlnet",),
        blocks={
            "layer.*": {
                "rel_attn.layer_norm": "attention_layernorm",
                "ff.layer_1": "intermediate",
                "ff.layer_2": "output",
                "ff.layer_norm": "output_layernorm",
            }
        },
        lm_head=("lm_loss",),
        free={"rel_attn.r_w_bias|r_r_bias|r_s_bias": "query"},
    ),
    Family(
        model_types=("funnel",),
        blocks={
            block: {
                "attention.q_head": "query",
                "attention.k_head": "key",
                "attention.v_head": "value",
                "attention.post_proj": "attention_output",
                "attention.layer_norm": "attention_layernorm",
                "ffn.linear_1": "intermediate",
                "ffn.linear_2": "output",
                "ffn.layer_norm": "output_layernorm",
            }
            for block in ("encoder.blocks.*.*", "decoder.layers.*")
        },
        outside={"embeddings.layer_norm": "embedding_layernorm"},
        lm_head=("lm_head",),
        free={"attention.r_w_bias|r_r_bias|r_s_bias": "query"},
        stacks={"encoder": "encoder", "decoder": "decoder"},
    ),
    Family(
        model_types=("gpt2", "gpt_neo", "gptj", "openai-gpt"),
        blocks={"h.*": _GPT_LAYER},
        lm_head=("lm_head",),
        fused={"attn.c_attn": fused.thirds, "crossattention.c_attn": fused.halves},
    ),
    Family(
        model_types=("codegen",),
        blocks={"h.*": _GPT_LAYER},
        lm_head=("lm_head",),
        fused={"attn.qkv_proj": fused.codegen},
    ),
    Family(
        model_types=("gpt_bigcode",),
        blocks={"h.*": _GPT_LAYER},
        lm_head=("lm_head",),
        fused={"attn.c_attn": fused.gpt_bigcode},
    ),
    Family(
        model_types=("gpt_neox", "gpt_neox_japanese", "persimmon"),
        blocks={"layers.*": _NEOX_LAYER},
        lm_head=("lm_head", "embed_out"),
        fused={"attention|self_attn.query_key_value": fused.per_head},
        free={"attention.dense_bias": "attention_output"},
    ),
    Family(
        model_types=("bloom",),
        blocks={"h.*": _NEOX_LAYER},
        outside={"word_embeddings_layernorm": "embedding_layernorm"},
        lm_head=("lm_head",),
        fused={"self_attention.query_key_value": fused.per_head},
    ),
    Family(
        model_types=("falcon",),
        blocks={"h.*": _NEOX_LAYER},
        lm_head=("lm_head",),
        fused={"self_attention.query_key_value": fused.falcon},
    ),
    Family(
        model_types=("mpt",),
        blocks={
            "blocks.*": {
                "norm_1": "attention_layernorm",
                "attn.out_proj": "attention_output",
                "norm_2": "output_layernorm",
                "ffn.up_proj": "intermediate",
                "ffn.down_proj": "output",
            }
        },
        lm_head=("lm_head",),
        fused={"attn.Wqkv": fused.thirds},
    ),
    Family(
        model_types=(
            *("llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi"),
            *("stablelm", "starcoder2", "olmo", "olmoe", "granite", "cohere", "cohere2", "smollm3", "helium", "glm"),
            *("eurobert", "seed_oss", "arcee", "gpt_oss", "diffllama", "nemotron"),
        ),
        blocks={"layers.*": _LLAMA_LAYER},
        lm_head=("lm_head",),
    ),
    Family(
        model_types=("phi3",),
        blocks={"layers.*": _LLAMA_LAYER},
        lm_head=("lm_head",),
        fused={"self_attn.qkv_proj": fused.phi3},
    ),
    Family(
        model_types=("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"),
        blocks={"layers.*": _SANDWICH_LLAMA_LAYER},
        lm_head=("lm_head",),
    ),
    Family(model_types=("mamba", "mamba2", "falcon_mamba"), blocks={"layers.*": {}}, lm_head=("lm_head",)),
    Family(
        model_types=("t5", "mt5", "umt5", "longt5"),
        blocks={
            "encoder.block.*": {
                **_T5_ATTENTION,
                "layer.0.layer_norm": "attention_layernorm",
                "layer.1.layer_norm": "output_layernorm",
            },
            "decoder.block.*": {
                **_T5_ATTENTION,
                "layer.0|1.layer_norm": "attention_layernorm",
                "layer.2.layer_norm": "output_layernorm",
            },
        },
        lm_head=("lm_head",),
        stacks={"encoder": "encoder", "decoder": "decoder"},
    ),
    Family(
        model_types=(
            *("bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "m2m_100", "plbart"),
            *("whisper", "speech_to_text", "opt", "biogpt", "xglm", "trocr"),
        ),
        blocks={"layers.*": _BART_LAYER},
        outside={"layernorm_embedding": "embedding_layernorm"},
        lm_head=("lm_head", "proj_out", "output_projection"),
        stacks={"encoder": "encoder", "decoder": "decoder"},
    ),
    Family(
        model_types=(
            *("vit", "deit", "beit", "vit_mae", "vit_msn", "audio-spectrogram-transformer"),
            *("dinov2", "dinov2_with_registers"),
        ),
        blocks={"layers.*": _VIT_LAYER, "encoder.layer.*": _VIT_LAYER},
        outside={"pooler.dense": "pooler", "pooler.layernorm": "pooler"},
    ),
    Family(
        model_types=("data2vec-vision", "yolos", "vilt", "videomae"),
        blocks={"encoder.layer.*": _OLD_VIT_LAYER},
        outside={
            "text_embeddings.LayerNorm": "embedding_layernorm",
            "pooler.dense": "pooler",
            "pooler.layernorm": "pooler",
        },
        lm_head=("mlm_score",),
    ),
    Family(
        model_types=("swin", "swinv2", "donut-swin"),
        blocks={"encoder.layers.*.blocks.*": {**_BERT_LAYER, **_VIT_LAYER}},
        outside={"embeddings.norm": "embedding_layernorm"},
    ),
    Family(
        model_types=(
            *("clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_text_model", "siglip_vision_model"),
            *("siglip2", "siglip2_text_model", "siglip2_vision_model"),
            *("metaclip_2", "metaclip_2_text_model", "metaclip_2_vision_model"),
            *("chinese_clip", "chinese_clip_text_model", "chinese_clip_vision_model"),
        ),
        blocks={"encoder.layers.*": _CLIP_LAYER, "encoder.layer.*": _BERT_LAYER},
        outside={**_BERT_OUTSIDE, "pre_layrnorm": "embedding_layernorm"},
        stacks={"text_model": "text", "vision_model": "vision"},
    ),
    Family(
        model_types=("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "sew"),
        blocks={
            "encoder.layers.*": {
                "attention.q_proj": "query",
                "attention.k_proj": "key",
                "attention.v_proj": "value",
                "attention.out_proj": "attention_output",
                "layer_norm": "attention_layernorm",
                "feed_forward.intermediate_dense": "intermediate",
                "feed_forward.output_dense": "output",
                "final_layer_norm": "output_layernorm",
            }
        },
        lm_head=("lm_head",),
    ),
)

_BY_MODEL_TYPE = {model_type: family for family in _FAMILIES for model_type in family.model_types}

# torch's own transformer layers mean the same in every model.
TORCH_LAYERS: tuple[tuple[type[nn.Module], Mapping[str, str]], ...] = (
    (
        nn.TransformerEncoderLayer,
        {"linear1": "intermediate", "linear2": "output", "norm1": "attention_layernorm", "norm2": "output_layernorm"},
    ),
    (
        nn.TransformerDecoderLayer,
        {
            "linear1": "intermediate",
            "linear2": "output",
            "norm1|norm2": "attention_layernorm",
            "norm3": "output_layernorm",
        },
    ),
)

# Names under which composite models keep their parts, and what the part is called.
STACKS: Mapping[str, str] = {
    "encoder": "encoder",
    "decoder": "decoder",
    "text_model": "text",
    "text_encoder": "text",
    "language_model": "text",
    "vision_model": "vision",
    "vision_tower": "vision",
    "visual": "vision",
    "audio_tower": "audio",
    "audio_model": "audio",
}


def family_of(module: nn.Module) -> Family | None:
    """The family of a Hugging Face model, by its `config.model_type`."""
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return _BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
