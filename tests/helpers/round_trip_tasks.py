"""The kinds of tasks that `test_round_trip` sends through every way, and their bases on a loopback Hub."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from architectures import ARCHITECTURES, IMAGE, VOCAB, output_tensors, randomize_
from hub_deltas import make_tokenizer
from hub_server import LoopbackHub
from torch import nn
from tuner_tester import Tensors

from bitfit_hf import TaskBank


@dataclass(frozen=True)
class Task:
    """A kind of task.

    Args:
        arch (`str`): In [`ARCHITECTURES`]: what the tuned model is.
        base (`str`): In [`ARCHITECTURES`]: what the base checkpoint on the Hub was saved from.
        auto (`str`): The ending of transformers' and PEFT's auto classes.
        task_type (`str`, *optional*): PEFT's name of the task, where it has one.
        tag (`str`, *optional*): The pipeline's name, where there is one.
        options (`Mapping`, *optional*): What the user says of the labels when the base is loaded for training.
        labels (`Callable`, *optional*): Makes labels other than the architecture's own for a batch.
        config (`Mapping`, *optional*): Of the [`BitFitConfig`].
        new_tokens (`int`, *optional*): How many tokens the user adds to the vocabulary before training.
        has_stock_form (`bool`, *optional*): Whether stock PEFT has a form for the delta.
    """

    arch: str
    base: str
    auto: str
    task_type: str | None = None
    tag: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Callable[[int], torch.Tensor] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    new_tokens: int = 0
    has_stock_form: bool = True

    @property
    def auto_class(self) -> Any:
        return getattr(transformers, f"AutoModel{self.auto}")

    @property
    def auto_peft_class(self) -> Any:
        if self.task_type is None:
            return peft.AutoPeftModel
        return getattr(peft, f"AutoPeftModel{self.auto or 'ForFeatureExtraction'}")

    @property
    def base_name(self) -> str:
        return f"alice/{self.base}"

    def load(self) -> nn.Module:
        """The base, loaded for training."""
        model = self.auto_class.from_pretrained(self.base_name, **self.options).eval()
        if self.new_tokens:
            model.resize_token_embeddings(VOCAB + self.new_tokens)
        return model

    def base_model(self) -> nn.Module:
        """The base, as who wants to use a delta loads it: knowing nothing of the labels."""
        return copy.deepcopy(_stock(self.auto, self.base_name))

    def bank(self) -> TaskBank:
        """The bank on the base, the same for all deltas."""
        return _shared_bank(self.auto, self.base_name)

    def inputs(self, count: int = 2) -> Tensors:
        """A batch, with each of the new tokens in every example."""
        inputs = ARCHITECTURES[self.arch].inputs(count)
        for number in range(self.new_tokens):
            inputs["input_ids"][:, 1 + number] = VOCAB + number
        return inputs

    def rows(self, count: int = 4) -> list[Tensors]:
        """Examples to train on."""
        labels = {"labels": self.labels(count)} if self.labels else ARCHITECTURES[self.arch].labels(count)
        batch = {**self.inputs(count), **labels}
        return [{name: tensor[i] for name, tensor in batch.items()} for i in range(count)]

    @torch.no_grad()
    def outputs(self, model: Callable[..., Any], **kwargs: Any) -> list[torch.Tensor]:
        """Every float tensor that the model answers with."""
        found = output_tensors(model(**self.inputs(), **kwargs))
        assert found
        return [tensor.clone() for tensor in found]


@cache
def _stock(auto: str, base_name: str) -> nn.Module:
    return getattr(transformers, f"AutoModel{auto}").from_pretrained(base_name).eval()


@cache
def _shared_bank(auto: str, base_name: str) -> TaskBank:
    return TaskBank(_stock(auto, base_name), make_tokenizer())


def _three(prefix: str) -> dict[str, Any]:
    return {"num_labels": 3, "id2label": {i: f"{prefix}{i}" for i in range(3)}}


def _several(count: int) -> torch.Tensor:
    """Labels of which more than one may hold: transformers takes such labels as floats."""
    return torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]]).repeat(count, 1)[:count]


_FOUR = {"num_labels": 4, "id2label": {i: f"topic{i}" for i in range(4)}}
_sequence = partial(
    Task, "bert-sequence", "bert-backbone", "ForSequenceClassification", "SEQ_CLS", "text-classification"
)
TASKS: dict[str, Task] = {
    "two labels": _sequence({"num_labels": 2}, lambda count: torch.arange(count) % 2),
    "three labels": _sequence(_three("mood")),
    "regression": _sequence({"num_labels": 1}, lambda count: torch.linspace(-1, 1, count)),
    "multi-label": _sequence({**_FOUR, "problem_type": "multi_label_classification"}, _several),
    "multi-label by its labels": _sequence(_FOUR, _several),
    "added tokens": _sequence(_three("mood"), new_tokens=2, has_stock_form=False),
    "a head of two layers": Task(
        "roberta-sequence",
        "roberta-masked_lm",
        "ForSequenceClassification",
        "SEQ_CLS",
        "text-classification",
        _three("mood"),
    ),
    "a decoder's score": Task(
        "gpt2-sequence",
        "gpt2-causal_lm",
        "ForSequenceClassification",
        "SEQ_CLS",
        "text-classification",
        _three("mood"),
    ),
    "token classification": Task(
        "bert-token", "bert-backbone", "ForTokenClassification", "TOKEN_CLS", "token-classification", _three("tag")
    ),
    "question answering": Task("bert-question", "bert-backbone", "ForQuestionAnswering", "QUESTION_ANS"),
    "multiple choice": Task("bert-choice", "bert-backbone", "ForMultipleChoice"),
    "image classification": Task(
        "vit-image", "vit-backbone", "ForImageClassification", None, "image-classification", _three("animal")
    ),
    "audio classification": Task(
        "whisper-audio",
        "whisper-seq2seq_lm",
        "ForAudioClassification",
        None,
        "audio-classification",
        _three("word"),
    ),
    "feature extraction": Task("bert-backbone", "bert-backbone", "", "FEATURE_EXTRACTION", "feature-extraction"),
    "masked LM": Task("bert-masked_lm", "bert-masked_lm", "ForMaskedLM", None, "fill-mask"),
    "causal LM": Task("gpt2-causal_lm", "gpt2-causal_lm", "ForCausalLM", "CAUSAL_LM", "text-generation"),
    "added biases": Task(
        "llama-causal_lm",
        "llama-causal_lm",
        "ForCausalLM",
        "CAUSAL_LM",
        "text-generation",
        config={"add_missing_biases": True},
        has_stock_form=False,
    ),
    "seq2seq LM": Task("bart-seq2seq_lm", "bart-seq2seq_lm", "ForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}


# Bases ---------------------------------------------------------------------------------------------------------------


def put_bases(hub: LoopbackHub) -> None:
    """Puts the bases of all tasks on the Hub, each with what a pipeline needs."""
    for name in sorted({task.base for task in TASKS.values()}):
        with tempfile.TemporaryDirectory() as folder:
            _small(name).save_pretrained(folder)
            processor(ARCHITECTURES[name].family).save_pretrained(folder)
            hub.put(f"alice/{name}", {path.name: path.read_bytes() for path in Path(folder).iterdir()})


def _small(name: str) -> nn.Module:
    """The model of an architecture with one layer, whose configuration knows nothing of labels."""
    model = ARCHITECTURES[name].build()
    config = model.config
    for field_name in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, field_name):
            setattr(config, field_name, 1)
    config.num_labels = 2
    return randomize_(type(model)(config))


def processor(family: str) -> Any:
    if family == "vit":
        return transformers.ViTImageProcessor(size={"height": IMAGE, "width": IMAGE})
    if family == "whisper":
        return transformers.WhisperFeatureExtractor(feature_size=8)
    return make_tokenizer()
