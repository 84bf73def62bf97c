"""A zoo of tiny random models, one or more for every supported architecture, built from configs and never downloaded.

    from architectures import ARCHITECTURES, build, select

    @pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=str)
    def test_something(arch):
        model = arch.build(seed=0)                  # eval mode, dropout 0 everywhere, the same tensors on every call
        outputs = model(**arch.inputs(batch_size=2))
        loss = model(**arch.inputs(), **arch.labels()).loss     # where `arch.trainable`

* [`ARCHITECTURES`] maps a name such as `"bert-sequence"` to an [`Architecture`]; [`select`] filters it by kind and
  family; [`build`] is `ARCHITECTURES[name].build()`, [`shared`] the same, once per session, for tests that only look.
* [`randomize_`] gives every floating parameter a random value: many biases start at zero, and "two different models"
  made by two seeds would then have equal biases.
* [`output_tensors`] flattens whatever a model returns into a list of float tensors.
* Every bias that `forward` uses gets a gradient from these inputs, once the model is randomized. None gets one by
  nature: key biases where positions are not rotary (softmax is shift-invariant), DeBERTa-v2's `pos_key_proj` for the
  same reason, and CLIP's `vision_model.post_layernorm` in image classification, which pools before it.
* The plain `nn.Module`s of `plain_modules.py` (`"mlp"`, `"convnet"`, ..., `"traps"`) have no config and no task type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from plain_modules import MLP, AttentionNet, BiasFreeNet, ConvNet, TorchEncoder, TrapNet
from torch import nn

HIDDEN, HEADS, INTERMEDIATE, VOCAB, LENGTH, LABELS = 32, 4, 40, 64, 7, 3
IMAGE, PATCH = 8, 4

# What a model ends in. The first row has a new task head, the second has none.
HEAD_KINDS = ("sequence", "token", "question", "choice", "image", "audio")
HEADLESS_KINDS = ("backbone", "masked_lm", "causal_lm", "seq2seq_lm", "contrastive", "plain")


@dataclass(frozen=True)
class Architecture:
    """One tiny model.

    Args:
        name (`str`): Key in [`ARCHITECTURES`], `"<family>-<kind>"` with a suffix for variants.
        family (`str`): `"bert"`, `"gpt2"`, ..., or `"plain"`.
        kind (`str`): One of `HEAD_KINDS` or `HEADLESS_KINDS`.
        factory (`Callable`): Makes the model; called by [`build`] under a fixed seed.
        make_inputs (`Callable`): `(batch_size, generator) -> dict` of keyword arguments for `forward`.
        make_labels (`Callable`, *optional*): The same for the labels; `None` where `forward` computes no loss.
        bias_free (`bool`): Whether nothing outside the head has a bias, so that the default selection is an error.
    """

    name: str
    family: str
    kind: str
    factory: Callable[[], nn.Module]
    make_inputs: Callable[[int, torch.Generator], dict[str, torch.Tensor]]
    make_labels: Callable[[int, torch.Generator], dict[str, torch.Tensor]] | None = None
    bias_free: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def trainable(self) -> bool:
        """Whether `model(**inputs(), **labels())` returns an object with a `loss`."""
        return self.make_labels is not None

    @property
    def is_transformers(self) -> bool:
        return self.family != "plain"

    def build(self, seed: int = 0) -> nn.Module:
        """The model in eval mode. Equal seeds give equal tensors; the caller's random state is left alone.

        It stands for a pre-trained one, whose pooler was trained: the pooler's biases are not zero.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.factory().eval()
            for name, parameter in model.named_parameters():
                if "pooler" in name and name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.02)
            return model

    def inputs(self, batch_size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
        """Keyword arguments for `forward`, the same on every call."""
        return self.make_inputs(batch_size, torch.Generator().manual_seed(seed))

    def labels(self, batch_size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
        """Keyword arguments that make `forward` compute a loss; empty where it has none."""
        return self.make_labels(batch_size, torch.Generator().manual_seed(seed)) if self.make_labels else {}


ARCHITECTURES: dict[str, Architecture] = {}


def build(name: str, seed: int = 0) -> nn.Module:
    """The model called `name`, in eval mode."""
    return ARCHITECTURES[name].build(seed)


@cache
def shared(name: str) -> nn.Module:
    """The model called `name`, built once for tests that only look at it and must not change it."""
    return build(name)


def select(kinds: Iterable[str] | None = None, families: Iterable[str] | None = None) -> list[Architecture]:
    """The architectures of these `kinds` and `families` (`None`: any). Finding none is an error, not a hollow test."""
    kinds, families = (None if wanted is None else set(wanted) for wanted in (kinds, families))
    found = [
        arch
        for arch in ARCHITECTURES.values()
        if (kinds is None or arch.kind in kinds) and (families is None or arch.family in families)
    ]
    if not found:
        raise LookupError(f"no architecture of kind {kinds} and family {families}")
    return found


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Adds noise of standard deviation `std` to every floating parameter in place; returns the model.

    Noise is added rather than assigned, so that norm weights stay near one. Tied parameters are changed once.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.add_(noise.to(parameter))
    return model


def snapshot(model: nn.Module) -> dict:
    """What a call that only looks, or that fails, must leave alone: modules, tensors, their values and flags."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "tensors": [(name, id(p), p.requires_grad, p.sum().item()) for name, p in model.named_parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
    }


def output_tensors(outputs: Any) -> list[torch.Tensor]:
    """Every float tensor in `outputs`, in order; looks into tuples, lists, mappings and model outputs."""
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [tensor for item in outputs for tensor in output_tensors(item)]
    return []


# Inputs and labels ---------------------------------------------------------------------------------------------------


def _ids(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB - 1, shape, generator=generator)


def _text(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Token ids; from the second example on the last two positions are padding (id 0)."""
    ids, mask = _ids(generator, batch, LENGTH), torch.ones(batch, LENGTH, dtype=torch.long)
    ids[1:, -2:], mask[1:, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _segmented_text(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    segments = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(batch, -1).clone()
    return {**_text(batch, generator), "token_type_ids": segments}


def _choices(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    flat = _text(batch * LABELS, generator)
    return {name: tensor.view(batch, LABELS, LENGTH) for name, tensor in flat.items()}


def _text_to_text(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_text(batch, generator), "decoder_input_ids": _ids(generator, batch, LENGTH - 2)}


def _text_with_end(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Encoder-decoder classifiers read the position of the last end token (id 2): one per example, at the end."""
    inputs = _text(batch, generator)
    inputs["input_ids"][:, -1] = 2
    inputs["attention_mask"][:] = 1
    return inputs


def _pixels(batch: int, generator: torch.Generator, size: int = IMAGE) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}


def _text_and_pixels(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_text_with_end(batch, generator), **_pixels(batch, generator)}


def _audio(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(batch, 8, 20, generator=generator)}


def _audio_to_text(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_audio(batch, generator), "decoder_input_ids": _ids(generator, batch, LENGTH - 2)}


def _floats(*shape: int) -> Callable[[int, torch.Generator], dict[str, torch.Tensor]]:
    return lambda batch, generator: {"x": torch.randn(batch, *shape, generator=generator)}


def _class_labels(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"labels": torch.randint(0, LABELS, (batch,), generator=generator)}


def _tag_labels(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"labels": torch.randint(0, LABELS, (batch, LENGTH), generator=generator)}


def _span_labels(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        f"{end}_positions": torch.randint(0, LENGTH - 2, (batch,), generator=generator) for end in ("start", "end")
    }


def _token_labels(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"labels": _ids(generator, batch, LENGTH)}


def _decoder_labels(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"labels": _ids(generator, batch, LENGTH - 2)}


_LABELS_OF_KIND = {
    "sequence": _class_labels,
    "token": _tag_labels,
    "question": _span_labels,
    "choice": _class_labels,
    "image": _class_labels,
    "audio": _class_labels,
    "masked_lm": _token_labels,
    "causal_lm": _token_labels,
    "seq2seq_lm": _decoder_labels,
    "backbone": None,
    "contrastive": None,
    "plain": None,
}


# Stock models --------------------------------------------------------------------------------------------------------


def _add(
    family: str, kind: str, class_name: str, config: Callable[[], Any], *, suffix="", inputs=None, **fields
) -> None:
    """Registers `transformers.<class_name>` under `"<family>-<kind>[-<suffix>]"`."""

    def factory() -> nn.Module:
        return getattr(transformers, class_name)(config())

    name = f"{family}-{kind}" + (f"-{suffix}" if suffix else "")
    if name in ARCHITECTURES:
        raise ValueError(f"{name} is registered twice")
    if inputs is None:
        inputs = {"choice": _choices, "seq2seq_lm": _text_to_text, "image": _pixels}.get(kind, _text)
    ARCHITECTURES[name] = Architecture(name, family, kind, factory, inputs, _LABELS_OF_KIND[kind], **fields)


def _config(class_name: str, **values: Any) -> Callable[[], Any]:
    """A thunk for a config: made anew for each model, since models write into theirs."""
    return lambda: getattr(transformers, class_name)(**{"pad_token_id": 0, "num_labels": LABELS, **values})


_BERT_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_bert = _config("BertConfig", **_BERT_LIKE)
_add("bert", "sequence", "BertForSequenceClassification", _bert, inputs=_segmented_text)
_add("bert", "token", "BertForTokenClassification", _bert, inputs=_segmented_text)
_add("bert", "question", "BertForQuestionAnswering", _config("BertConfig", **_BERT_LIKE | {"num_labels": 2}))
_add("bert", "choice", "BertForMultipleChoice", _bert)
_add("bert", "masked_lm", "BertForMaskedLM", _bert)
_add("bert", "backbone", "BertModel", _bert, inputs=_segmented_text)

_roberta = _config("RobertaConfig", **_BERT_LIKE, type_vocab_size=1)
_add("roberta", "sequence", "RobertaForSequenceClassification", _roberta)
_add("roberta", "token", "RobertaForTokenClassification", _roberta)
_add("roberta", "masked_lm", "RobertaForMaskedLM", _roberta)
_xlm_roberta = _config("XLMRobertaConfig", **_BERT_LIKE, type_vocab_size=1)
_add("xlm_roberta", "sequence", "XLMRobertaForSequenceClassification", _xlm_roberta)

_distilbert = _config(
    "DistilBertConfig",
    vocab_size=VOCAB,
    dim=HIDDEN,
    n_layers=2,
    n_heads=HEADS,
    hidden_dim=INTERMEDIATE,
    max_position_embeddings=16,
    dropout=0.0,
    attention_dropout=0.0,
    seq_classif_dropout=0.0,
    qa_dropout=0.0,
)
_add("distilbert", "sequence", "DistilBertForSequenceClassification", _distilbert)
_add("distilbert", "masked_lm", "DistilBertForMaskedLM", _distilbert)

_electra = _config("ElectraConfig", **_BERT_LIKE, embedding_size=16)
_add("electra", "sequence", "ElectraForSequenceClassification", _electra)

_albert = _config("AlbertConfig", **_BERT_LIKE, embedding_size=16, classifier_dropout_prob=0.0)
_add("albert", "sequence", "AlbertForSequenceClassification", _albert)
_albert_groups = _config(
    "AlbertConfig",
    **_BERT_LIKE,
    embedding_size=16,
    classifier_dropout_prob=0.0,
    num_hidden_groups=2,
    inner_group_num=2,
)
_add("albert", "backbone", "AlbertModel", _albert_groups, suffix="groups")

# Relative attention in both directions, so that `pos_q_proj` (which has a bias) exists and is used.
_deberta = _config(
    "DebertaConfig",
    **_BERT_LIKE,
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
    max_relative_positions=8,
    position_biased_input=False,
    pooler_dropout=0.0,
)
_add("deberta", "sequence", "DebertaForSequenceClassification", _deberta)
_deberta_v2 = _config(
    "DebertaV2Config",
    **_BERT_LIKE,
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
    max_relative_positions=8,
    position_buckets=4,
    norm_rel_ebd="layer_norm",
    share_att_key=False,
    conv_kernel_size=3,
    pooler_dropout=0.0,
)
_add("deberta_v2", "sequence", "DebertaV2ForSequenceClassification", _deberta_v2)
_add("mpnet", "sequence", "MPNetForSequenceClassification", _config("MPNetConfig", **_BERT_LIKE))

_MODERNBERT = _LLAMA_LIKE | {
    "local_attention": 4,
    "global_attn_every_n_layers": 2,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "mlp_dropout": 0.0,
    "classifier_dropout": 0.0,
    "attn_implementation": "eager",
    "reference_compile": False,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
del _MODERNBERT["num_key_value_heads"]
_modernbert = _config("ModernBertConfig", **_MODERNBERT)
_modernbert_biased = _config("ModernBertConfig", **_MODERNBERT, norm_bias=True, attention_bias=True, mlp_bias=True)
_add("modernbert", "sequence", "ModernBertForSequenceClassification", _modernbert, bias_free=True)
_add("modernbert", "sequence", "ModernBertForSequenceClassification", _modernbert_biased, suffix="biased")
_add("modernbert", "masked_lm", "ModernBertForMaskedLM", _modernbert)

_gpt2 = _config(
    "GPT2Config",
    vocab_size=VOCAB,
    n_embd=HIDDEN,
    n_layer=2,
    n_head=HEADS,
    n_inner=INTERMEDIATE,
    n_positions=16,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    summary_first_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
)
_add("gpt2", "causal_lm", "GPT2LMHeadModel", _gpt2)
_add("gpt2", "sequence", "GPT2ForSequenceClassification", _gpt2)

_NEOX = {name: value for name, value in _LLAMA_LIKE.items() if name != "num_key_value_heads"}
_neox = _config("GPTNeoXConfig", **_NEOX, rotary_pct=0.25, attention_dropout=0.0, hidden_dropout=0.0)
_add("gpt_neox", "causal_lm", "GPTNeoXForCausalLM", _neox)

_opt = _config(
    "OPTConfig",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    word_embed_proj_dim=HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    ffn_dim=INTERMEDIATE,
    max_position_embeddings=16,
    dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
)
_add("opt", "causal_lm", "OPTForCausalLM", _opt)

_bloom = _config(
    "BloomConfig",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    n_layer=2,
    n_head=HEADS,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
)
_add("bloom", "causal_lm", "BloomForCausalLM", _bloom)
_add("qwen2", "causal_lm", "Qwen2ForCausalLM", _config("Qwen2Config", **_LLAMA_LIKE))

_llama = _config("LlamaConfig", **_LLAMA_LIKE)
_add("llama", "causal_lm", "LlamaForCausalLM", _llama, bias_free=True)
_add("llama", "sequence", "LlamaForSequenceClassification", _llama, bias_free=True)
_llama_biased = _config("LlamaConfig", **_LLAMA_LIKE, attention_bias=True, mlp_bias=True)
_add("llama", "causal_lm", "LlamaForCausalLM", _llama_biased, suffix="biased")

_mamba = _config("MambaConfig", vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4, expand=2)
_add("mamba", "causal_lm", "MambaForCausalLM", _mamba)
# Mamba 2 has what looks like a bias and is none: the vectors `dt_bias`, `A_log` and `D`.
_mamba2 = _config(
    "Mamba2Config",
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=2,
    state_size=4,
    expand=2,
    num_heads=8,
    head_dim=8,
    n_groups=1,
    chunk_size=4,
    bos_token_id=1,
    eos_token_id=2,
)
_add("mamba2", "causal_lm", "Mamba2ForCausalLM", _mamba2)

_T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": HIDDEN // HEADS,
    "d_ff": INTERMEDIATE,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "dropout_rate": 0.0,
    "classifier_dropout": 0.0,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
}
_t5 = _config("T5Config", **_T5)
_t5_gated = _config("T5Config", **_T5, feed_forward_proj="gated-gelu")
_add("t5", "seq2seq_lm", "T5ForConditionalGeneration", _t5, bias_free=True)
_add("t5", "seq2seq_lm", "T5ForConditionalGeneration", _t5_gated, suffix="gated", bias_free=True)
_add("t5", "sequence", "T5ForSequenceClassification", _t5, inputs=_text_with_end, bias_free=True)
_add("t5", "token", "T5ForTokenClassification", _t5, bias_free=True)
_t5_qa = _config("T5Config", **_T5, num_labels=2)
_add("t5", "question", "T5ForQuestionAnswering", _t5_qa, inputs=_text, bias_free=True)

_xlnet = _config(
    "XLNetConfig",
    vocab_size=VOCAB,
    d_model=HIDDEN,
    n_layer=2,
    n_head=HEADS,
    d_inner=INTERMEDIATE,
    dropout=0.0,
    summary_last_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
)
_add("xlnet", "sequence", "XLNetForSequenceClassification", _xlnet, inputs=_segmented_text)

_bart = _config(
    "BartConfig",
    vocab_size=VOCAB,
    d_model=HIDDEN,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=INTERMEDIATE,
    decoder_ffn_dim=INTERMEDIATE,
    max_position_embeddings=16,
    dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=2,
)
_add("bart", "seq2seq_lm", "BartForConditionalGeneration", _bart)
_add("bart", "sequence", "BartForSequenceClassification", _bart, inputs=_text_with_end)

_IMAGE_LIKE = {name: _BERT_LIKE[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")} | {
    "intermediate_size": INTERMEDIATE,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_vit = _config("ViTConfig", **_IMAGE_LIKE)
_add("vit", "image", "ViTForImageClassification", _vit)
_add("vit", "backbone", "ViTModel", _vit, inputs=_pixels)
_beit = _config(
    "BeitConfig", **_IMAGE_LIKE, use_relative_position_bias=True, layer_scale_init_value=0.1, drop_path_rate=0.0
)
_add("beit", "image", "BeitForImageClassification", _beit)
# Two stages of one and two blocks, with a patch-merging layer between them.
_swin = _config(
    "SwinConfig",
    image_size=16,
    patch_size=2,
    embed_dim=16,
    depths=[1, 2],
    num_heads=[2, 4],
    window_size=4,
    mlp_ratio=2.0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    drop_path_rate=0.0,
)
_add("swin", "image", "SwinForImageClassification", _swin, inputs=lambda batch, rng: _pixels(batch, rng, size=16))

_WHISPER = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INTERMEDIATE,
    "decoder_ffn_dim": INTERMEDIATE,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "classifier_proj_size": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_add(
    "whisper",
    "seq2seq_lm",
    "WhisperForConditionalGeneration",
    _config("WhisperConfig", **_WHISPER),
    inputs=_audio_to_text,
)
_add("whisper", "audio", "WhisperForAudioClassification", _config("WhisperConfig", **_WHISPER), inputs=_audio)
# With `layer_weights`, a parameter of the head that lies in no module.
_weighted = _config("WhisperConfig", **_WHISPER, use_weighted_layer_sum=True)
_add("whisper", "audio", "WhisperForAudioClassification", _weighted, inputs=_audio, suffix="weighted")

_CLIP_TOWER = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "attention_dropout": 0.0,
}
_clip = _config(
    "CLIPConfig",
    text_config=_CLIP_TOWER
    | {"vocab_size": VOCAB, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    vision_config=_CLIP_TOWER | {"image_size": IMAGE, "patch_size": PATCH},
    projection_dim=16,
)
_add("clip", "contrastive", "CLIPModel", _clip, inputs=_text_and_pixels)
_add("clip", "image", "CLIPForImageClassification", _clip)


# Plain modules -------------------------------------------------------------------------------------------------------


def _add_plain(name: str, factory: Callable[[], nn.Module], *shape: int, **fields) -> None:
    ARCHITECTURES[name] = Architecture(name, "plain", "plain", factory, _floats(*shape), None, **fields)


_add_plain("mlp", MLP, 10)
_add_plain("convnet", ConvNet, 2, 4, 4, 4)
_add_plain("attention", AttentionNet, LENGTH, HIDDEN)
_add_plain("torch_encoder", TorchEncoder, LENGTH, HIDDEN)
_add_plain("bias_free", BiasFreeNet, 10, bias_free=True)
_add_plain("traps", TrapNet, 10)
