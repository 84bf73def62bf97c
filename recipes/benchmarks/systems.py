"""What is compared: the shapes of the models and the ways of tuning them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import BeftConfig, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from bitfit_hf import BitFitConfig, recompute_activations

_SHARED_FROM = 1 << 17  # elements; all weight matrices, no bias and no head


@dataclass(frozen=True)
class Shape:
    """A model of a certain size, with random values: what a step costs does not depend on them.

    Args:
        hidden_size (`int`): Width of the model.
        layers (`int`): Number of layers.
        heads (`int`): Attention heads.
        intermediate_size (`int`): Width of the MLP.
        batch_size (`int`): Examples in a step.
        length (`int`): Tokens in an example.
        decoder (`bool`): A Llama with biases, else a BERT.
        key_value_heads (`int`, *optional*): Of a decoder with grouped queries.
        vocabulary (`int`): Rows of the embedding.
        dropout (`float`): Of a BERT.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    batch_size: int = 8
    length: int = 128
    decoder: bool = False
    key_value_heads: int | None = None
    vocabulary: int = 30522
    dropout: float = 0.1

    def build(self) -> PreTrainedModel:
        """A classifier of this shape in training mode; the same values on every call."""
        torch.manual_seed(0)
        common = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocabulary,
            "pad_token_id": 0,
        }
        if not self.decoder:
            drop = {"hidden_dropout_prob": self.dropout, "attention_probs_dropout_prob": self.dropout}
            model = BertForSequenceClassification(BertConfig(**common, **drop)).train()
            torch.nn.init.normal_(
                model.bert.pooler.dense.bias, std=0.02
            )  # as in a checkpoint whose pooler was trained
            return model
        config = LlamaConfig(
            **common, num_key_value_heads=self.key_value_heads, attention_bias=True, mlp_bias=True, use_cache=False
        )
        return LlamaForSequenceClassification(config).train()

    def batch(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What a step is taken on."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, self.vocabulary, (self.batch_size, self.length), generator=generator)
        return {"input_ids": ids.to(device), "labels": (torch.arange(self.batch_size) % 2).to(device)}

    @property
    def linears(self) -> list[str]:
        """Names of all Linear layers of the body."""
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        return (
            [*attention, "gate_proj", "up_proj", "down_proj"] if self.decoder else ["query", "key", "value", "dense"]
        )

    @property
    def queries_and_values(self) -> list[str]:
        """Names of the projections that LoRA's paper adapts."""
        return ["q_proj", "v_proj"] if self.decoder else ["query", "value"]

    @property
    def norms(self) -> list[str]:
        """Names of the layers' norms."""
        return ["input_layernorm", "post_attention_layernorm"] if self.decoder else ["LayerNorm"]

    @property
    def head(self) -> str:
        """Name of the task head."""
        return "score" if self.decoder else "classifier"


SHAPES: dict[str, Shape] = {
    "minilm": Shape(384, 6, 12, 1536),
    "bert-base": Shape(768, 12, 12, 3072),
    "bert-base-no-dropout": Shape(768, 12, 12, 3072, dropout=0.0),
    "bert-large": Shape(1024, 24, 16, 4096),
    # Two of the sixteen layers of Llama 3.2 1B, and hardly any embedding, so that the layers are what is measured.
    "decoder-1b": Shape(2048, 2, 32, 8192, batch_size=2, length=256, decoder=True, key_value_heads=8, vocabulary=1000),
}


def by_hand(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """Biases and head of the stock model, trained in place: the floor, without any wrapper."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith(".bias") or name.startswith(shape.head)
    return model


def head_only(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """A frozen body."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(shape.head)
    return model


def bitfit(model: PreTrainedModel, shape: Shape) -> PeftModel:
    """All biases, through the tuner."""
    return get_peft_model(model, BitFitConfig(task_type="SEQ_CLS"))


def _lora(model: PreTrainedModel, targets: list[str]) -> PeftModel:
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=targets))


System = Callable[[PreTrainedModel, Shape], nn.Module]
FULL, REFERENCE, BITFIT, LEAN = "full fine-tuning", "biases unfrozen by hand", "BitFit", "BitFit, lean"
SYSTEMS: dict[str, System] = {
    FULL: lambda model, shape: model,
    REFERENCE: by_hand,
    BITFIT: bitfit,
    LEAN: lambda model, shape: recompute_activations(bitfit(model, shape)),
    "BEFT, all Linears": lambda model, shape: get_peft_model(
        model, BeftConfig(task_type="SEQ_CLS", target_modules=shape.linears)
    ),
    "LayerNorm tuning": lambda model, shape: get_peft_model(
        model, LNTuningConfig(task_type="SEQ_CLS", target_modules=shape.norms)
    ),
    "LoRA r=8, q and v": lambda model, shape: _lora(model, shape.queries_and_values),
    "LoRA r=8, all Linears": lambda model, shape: _lora(model, shape.linears),
    "head only": head_only,
}


def prepare(system: str, shape: Shape, *, base: nn.Module | None = None, device: torch.device) -> nn.Module:
    """The model of one system, ready to be trained.

    Args:
        system (`str`): One of `SYSTEMS`.
        shape ([`Shape`]): Of the model.
        base (`torch.nn.Module`, *optional*):
            A stock model of the same shape, whose large weights are used instead of equal ones; the systems of a run
            then take the memory of two models, not of nine. Full fine-tuning gets weights of its own.
        device (`torch.device`): Where it computes.
    """
    model = shape.build().to(device)
    if base is not None and system != FULL:
        for own, shared in zip(model.parameters(), base.parameters(), strict=True):
            if own.numel() >= _SHARED_FROM:
                own.data = shared.data
    return SYSTEMS[system](model, shape).train()


def tiny(shape: Shape) -> Shape:
    """The same architecture in a size for tests."""
    heads = 4
    key_value_heads = None if shape.key_value_heads is None else heads // 2
    return replace(
        shape,
        hidden_size=8 * heads,
        layers=min(shape.layers, 2),
        heads=heads,
        intermediate_size=32 * heads,
        batch_size=2,
        length=8,
        key_value_heads=key_value_heads,
        vocabulary=64,
    )


def num_trainable(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters() if parameter.requires_grad)
