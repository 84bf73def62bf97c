"""What a user of the library writes, for type checkers: it passes `mypy --strict` and `pyright`, and is never run."""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from bitfit_hf import (
    BaseModelMismatchError,
    BiasDelta,
    BitFitCallback,
    BitFitConfig,
    TaskBank,
    base_mismatch,
    bias_change,
    load_delta,
    optimizer_groups,
    push_to_hub,
)


def train(name: str, rows: torch.utils.data.Dataset[dict[str, torch.Tensor]]) -> BiasDelta:
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    config = BitFitConfig(bias_terms=["query", "intermediate"], layers_to_transform=[0, 1])
    callback = BitFitCallback(config, head_learning_rate=1e-3, lr_scale={"query": 2.0})
    trainer = Trainer(model, TrainingArguments("out"), train_dataset=rows, callbacks=[callback])
    trainer.train()
    groups: list[dict[str, object]] = list(optimizer_groups(model, 1e-3, weight_decay=0.01))
    assert len(groups) > 1
    return BiasDelta.from_model(model)


def share(delta: BiasDelta, repo: str) -> str:
    half = 0.5 * delta
    for row in bias_change(half):
        print(row.term, row.layer)
    return push_to_hub(delta, repo, base_model="bert-base-uncased").oid


def serve(model: torch.nn.Module, tasks: dict[str, str]) -> list[str]:
    bank = TaskBank(model, max_tasks=8)
    for name, source in tasks.items():
        try:
            bank.add_task(name, source, pin=True)
        except BaseModelMismatchError as error:
            print(error)
    return list(bank.tasks)


def load(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    with base_mismatch("warn"):
        return load_delta(model, folder)


def count(delta: BiasDelta) -> int:
    parameters: int = delta.num_parameters(head=True)
    return parameters + sum(tensor.numel() for tensor in delta.values())
