"""What the tests of pushing and loading share: a base on the loopback Hub, tuned models on it, a tokenizer."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, VOCAB
from hub_server import LoopbackHub
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertTokenizer, PreTrainedModel
from tuner_tester import fill_

from bitfit_hf import BitFitConfig

BASE = "alice/base"
ARCH = ARCHITECTURES["bert-sequence"]
LABELS = {0: "no", 1: "perhaps", 2: "yes", 3: "certainly"}
INPUTS = ARCH.inputs(batch_size=2)

# What every push holds, and what it can hold beside.
DELTA_FILES = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
PICTURE = {"bias_change.png"}
STOCK_FILES = {"stock/adapter_config.json", "stock/adapter_model.safetensors"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


@cache
def base_files(seed: int = 0) -> dict[str, bytes]:
    """A tiny BERT without a task head, whose biases are not zero, as its files on the Hub."""
    model = ARCH.build(seed).bert
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)  # `pipeline` takes the base's, whatever is beside the delta
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def put_base(hub: LoopbackHub, repo_id: str = BASE, *, seed: int = 0) -> str:
    """Puts the base on the Hub; returns the commit."""
    return hub.put(repo_id, base_files(seed), message="base")


def load_base(name: str = BASE, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(name, **kwargs).eval()


def tune(base: PreTrainedModel, *, seed: int = 1, **values: Any) -> PeftModel:
    """A wrapped model with four named labels whose delta and head are random, as if it had been trained."""
    config = BitFitConfig(**{"task_type": "SEQ_CLS", "num_labels": 4, "id2label": LABELS, **values})
    return fill_(get_peft_model(base, config), seed=seed).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**INPUTS).logits.clone()


def make_tokenizer() -> BertTokenizer:
    """Knows the words `w5` to `w63`, each as the token of its number."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, VOCAB))]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def save_base(folder: Path, *, seed: int = 0) -> Path:
    """The base as a local folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in base_files(seed).items():
        (folder / name).write_bytes(data)
    return folder


def names_a_path(files: dict[str, bytes], *places: object) -> list[str]:
    """Which of a repository's files hold the name of one of these folders."""
    needles = [str(place).encode() for place in (*places, Path.home(), Path.cwd())]
    return [name for name, data in files.items() if any(needle in data for needle in needles)]
