"""What the tests of the bank share: random tasks on a small BERT, and each task's own model, put together by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from architectures import randomize_
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bitfit_hf import BiasDelta, BitFitConfig

ATOL = 1e-5

_CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip

# Ten kinds of tasks: class, labels and what is tuned.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sequence-2": ("BertForSequenceClassification", {"num_labels": 2}, {}),
    "sequence-3": ("BertForSequenceClassification", {"num_labels": 3}, {}),
    "sequence-7": ("BertForSequenceClassification", {"num_labels": 7}, {"bias_terms": "query+intermediate"}),
    "multi-4": (
        "BertForSequenceClassification",
        {"num_labels": 4, "problem_type": "multi_label_classification"},
        {"bias_terms": ["b_m1", "b_LN1"]},
    ),
    "regression": ("BertForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}, {}),
    "token-4": ("BertForTokenClassification", {"num_labels": 4}, {}),
    "token-9": ("BertForTokenClassification", {"num_labels": 9}, {"layers_to_transform": 1}),
    "question": ("BertForQuestionAnswering", {"num_labels": 2}, {}),
    "backbone": ("BertModel", {}, {}),
    "next": ("BertForSequenceClassification", {"num_labels": 2}, {"bias_terms": "pooler"}),
}


def kind_of(task: str) -> str:
    """The kind of a task `"<kind>-<number>"`."""
    return task.rpartition("-")[0]


def bert_base() -> nn.Module:
    """The same small random BERT on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize_(BertModel(BertConfig(**_CONFIG))).eval()


def stock_model(base: nn.Module, kind: str) -> nn.Module:
    """A stock model of the kind's class with the weights of `base`, or of its backbone."""
    class_name, settings, _ = KINDS[kind]
    config = copy.deepcopy(base.config)
    for name, value in settings.items():
        setattr(config, name, value)
    if "num_labels" in settings:
        config.id2label = {index: f"{kind}:{index}" for index in range(settings["num_labels"])}
    model = getattr(transformers, class_name)(config).eval()
    backbone = model.base_model
    missing = backbone.load_state_dict(base.base_model.state_dict(), strict=False).missing_keys
    assert not missing
    return model


def random_delta(base: nn.Module, kind: str, *, seed: int, std: float = 0.1) -> BiasDelta:
    """The delta of a task of that kind on `base`, as if it had been trained."""
    tuned = get_peft_model(stock_model(base, kind), BitFitConfig(**KINDS[kind][2])).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "default" in name.split("."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return BiasDelta.from_model(tuned)


def single_model(base: nn.Module, delta: BiasDelta, kind: str) -> nn.Module:
    """A stock model with the delta added into its own parameters by name, and the delta's head."""
    model = stock_model(base, kind)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in delta.items():
            parameters[name].add_(value)
        for name, value in delta.head.items():
            parameters[name].copy_(value)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of one letter, in the manner of BERT."""
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: index for index, word in enumerate([*specials, *"abcdefgh"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
