"""A Trainer saves and pushes the adapter that it trains, whichever adapter of the model is the active one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_deltas import load_base, put_base
from peft import get_peft_model
from trainer_tester import IN_PLACE, WAYS, WRAPPED, fresh, rows, same, saved, trainer_for, tuned

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig
from bitfit_hf.errors import AdapterNameError, TrainerSetupError

REPO = "alice/{}"
TASKS = {"stance": 3, "intent": 5}


def names_of(task: str) -> dict[int, str]:
    return {index: f"{task}-{index}" for index in range(TASKS[task])}


def task_rows(task: str) -> list[dict[str, torch.Tensor]]:
    return [{**row, "labels": torch.tensor(i % TASKS[task])} for i, row in enumerate(rows(8, seed=TASKS[task]))]


def trained(way: str, folder: Path, base: Any = None, **values: Any) -> tuple[Any, dict[str, Any]]:
    """A model with both tasks, trained one after the other, and their Trainers; the second one's adapter is active."""
    model = fresh() if base is None else base
    trainers = {}
    for task in TASKS:
        config = BitFitConfig(id2label=names_of(task))
        if way == WRAPPED and not trainers:
            model = get_peft_model(model, config, adapter_name=task)
        callback = BitFitCallback(config, adapter_name=task)
        options = {key: value.format(task) for key, value in values.items()}
        trainers[task] = trainer_for(model, folder / task, callback, train=task_rows(task), **options)
        trainers[task].train()
    return model, trainers


def state_of(model: Any) -> dict[str, Any]:
    """What saving must leave as it is."""
    return {
        "active": list(model.active_adapters() if callable(model.active_adapters) else model.active_adapters),
        "trainable": {name for name, parameter in model.named_parameters() if parameter.requires_grad},
        "labels": dict(model.config.id2label),
    }


def delta_folder(folder: Path, way: str, task: str) -> Path:
    return folder / task if way == WRAPPED else folder


@pytest.mark.parametrize("way", WAYS)
def test_save_model_writes_the_trainers_own(way: str, tmp_path: Path) -> None:
    model, trainers = trained(way, tmp_path)
    before = state_of(model)
    assert before["active"] == ["intent"]
    for task, trainer in trainers.items():
        trainer.save_model(str(tmp_path / "saved" / task))
        folder = delta_folder(tmp_path / "saved" / task, way, task)
        assert same(saved(folder), tuned(model, task)), task
        values = json.loads((folder / "adapter_config.json").read_text())
        assert values["num_labels"] == TASKS[task]
        assert list(values["id2label"].values()) == list(names_of(task).values())
        assert values["run"]["num_examples"] == 8
        assert state_of(model) == before
    assert not same(tuned(model, "stance"), tuned(model, "intent"))


@pytest.mark.parametrize("way", WAYS)
def test_push_to_hub_pushes_the_trainers_own(way: str, hub: Any, hub_env: Any, tmp_path: Path) -> None:
    put_base(hub)
    model, trainers = trained(way, tmp_path, load_base(), hub_model_id=REPO)
    before = state_of(model)
    for task, trainer in trainers.items():
        trainer.push_to_hub()
        pushed = BiasDelta.from_pretrained(REPO.format(task))
        assert pushed.digest == BiasDelta.from_model(model, task).digest, task
        assert pushed.config.id2label == names_of(task)
        assert names_of(task)[0] in hub.files(REPO.format(task))["README.md"].decode()
        assert state_of(model) == before


def test_a_save_while_adapters_are_disabled(tmp_path: Path) -> None:
    model, trainers = trained(IN_PLACE, tmp_path)
    model.disable_adapters()
    own = dict(model.config.id2label)
    trainers["stance"].save_model(str(tmp_path / "saved"))
    assert same(saved(tmp_path / "saved"), tuned(model, "stance"))
    values = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert list(values["id2label"].values()) == list(names_of("stance").values())
    assert model.config.id2label == own
    model.enable_adapters()
    assert model.config.id2label == names_of("intent")


def test_a_deleted_adapter_is_an_error(tmp_path: Path) -> None:
    model, trainers = trained(IN_PLACE, tmp_path)
    model.delete_adapter("stance")
    with pytest.raises(
        AdapterNameError, match=r"adapter 'stance' .* is not in the model any more \(it has \['intent'\]"
    ):
        trainers["stance"].save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    trainers["intent"].save_model(str(tmp_path / "saved"))
    assert same(saved(tmp_path / "saved"), tuned(model, "intent"))


def test_another_merged_adapter_is_an_error(tmp_path: Path) -> None:
    # Switching adapters would unmerge it.
    model, trainers = trained(IN_PLACE, tmp_path)
    layers = [module for module in model.modules() if hasattr(module, "bias_parameters")]
    for layer in layers:
        layer.merge()
    with pytest.raises(TrainerSetupError, match=r"'intent' .*merged[\s\S]*unmerge"):
        trainers["stance"].save_model(str(tmp_path / "saved"))
    assert all(layer.merged for layer in layers)
    trainers["intent"].save_model(str(tmp_path / "saved"))
    assert same(saved(tmp_path / "saved"), tuned(model, "intent"))


def test_one_callback_keeps_its_trainers_apart(tmp_path: Path) -> None:
    callback = BitFitCallback(adapter_name="task")
    models = [fresh(seed=seed) for seed in range(2)]
    trainers = [trainer_for(model, tmp_path, callback) for model in models]
    for model in models:
        model.add_adapter(BitFitConfig(), "other")
    for number, (model, trainer) in enumerate(zip(models, trainers, strict=True)):
        trainer.save_model(str(tmp_path / str(number)))
        assert same(saved(tmp_path / str(number)), tuned(model, "task"))
        assert model.active_adapters() == ["other"]


@pytest.mark.parametrize("way", WAYS)
def test_the_card_quotes_evaluations_of_the_own_adapter_only(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, trainers = trained(way, tmp_path)
    trainer = trainers["stance"]
    model.set_adapter("stance")
    loss = trainer.evaluate()["eval_loss"]
    metrics = dict(model.peft_config["stance"].run.metrics)
    assert metrics["loss"] == loss
    assert not caplog.records

    other = [{**row, "labels": row["labels"] % 2} for row in task_rows("stance")]
    model.set_adapter("intent")
    trainer.evaluate(other)
    (record,) = caplog.records
    assert "not of the Trainer's adapter 'stance'" in record.getMessage()
    assert model.peft_config["stance"].run.metrics == metrics
    model.set_adapter("stance")
    for module in model.modules():
        if hasattr(module, "bias_parameters"):
            module.merge()
    trainer.evaluate(other)  # merged it is the same task
    assert model.peft_config["stance"].run.metrics != metrics
    assert len(caplog.records) == 1
