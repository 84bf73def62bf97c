"""What a Trainer refuses to resume from, before anything is loaded: another base, head, or set of rates."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from trainer_tester import (
    IN_PLACE,
    WAYS,
    WRAPPED,
    fresh,
    moved,
    prepared,
    rows,
    same,
    stock_trainer,
    trainer_for,
    tuned,
)
from tuner_tester import base_tensors, same_tensors, state

from bitfit_hf import BaseModelMismatchError, BitFitCallback, BitFitConfig, base_mismatch
from bitfit_hf.errors import ConfigError, DeltaFormatError, DeltaMismatchError, OptimizerError

RATE, HEAD_RATE = 1e-2, 3e-3


def checkpoint_of(model: Any, folder: Path, *callbacks: Any, **values: Any) -> str:
    trainer_for(model, folder, *callbacks, save_steps=2, **values).train()
    return str(folder / "checkpoint-2")


# --- the base ---


@pytest.mark.parametrize("adapter_name", ["default", "rte"])
@pytest.mark.parametrize("way", WAYS)
def test_another_base_is_refused(way: str, adapter_name: str, tmp_path: Path) -> None:
    def model_and_callback(seed: int) -> tuple[Any, BitFitCallback]:
        model = fresh(seed=seed)
        if way == WRAPPED:
            model = get_peft_model(model, BitFitConfig(), adapter_name=adapter_name)
        return model, BitFitCallback(adapter_name=adapter_name)

    first, callback = model_and_callback(0)
    checkpoint = checkpoint_of(first, tmp_path / "first", callback)
    other, callback = model_and_callback(1)
    trainer = trainer_for(other, tmp_path / "second", callback)
    before = state(other)
    with pytest.raises(BaseModelMismatchError, match=r"trained on .*tensors differ"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert state(other) == before
    assert not moved(other, adapter_name)

    with base_mismatch("warn"), pytest.warns(UserWarning, match="tensors differ"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert moved(other, adapter_name)
    with base_mismatch("ignore"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tensors differ")
        again, callback = model_and_callback(1)
        trainer_for(again, tmp_path / "third", callback).train(resume_from_checkpoint=checkpoint)
    assert same(tuned(again, adapter_name), tuned(other, adapter_name))


@pytest.mark.parametrize("way", WAYS)
def test_the_last_checkpoint_is_checked_too(way: str, tmp_path: Path) -> None:
    checkpoint_of(prepared(way), tmp_path)
    with pytest.raises(BaseModelMismatchError):
        trainer_for(prepared(way, seed=1), tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_base_in_another_precision_is_taken(way: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(prepared(way), tmp_path / "first")
    model = fresh().to(torch.bfloat16)
    if way == WRAPPED:
        model = get_peft_model(model, BitFitConfig())
    trainer_for(model, tmp_path / "second").train(resume_from_checkpoint=checkpoint)
    assert moved(model)


@pytest.mark.parametrize("way", WAYS)
def test_model_init_on_another_base_is_refused(way: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(prepared(way), tmp_path / "first")
    trainer = trainer_for(None, tmp_path / "second", options={"model_init": lambda: prepared(way, seed=1)})
    with pytest.raises(BaseModelMismatchError):
        trainer.train(resume_from_checkpoint=checkpoint)


# --- the head ---


@pytest.mark.parametrize("way", WAYS)
def test_another_number_of_labels_is_one_sentence(way: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(prepared(way), tmp_path / "first")
    config = BitFitConfig(num_labels=5)
    train = [{**row, "labels": torch.tensor(i % 5)} for i, row in enumerate(rows(8))]
    model = prepared(way, config)
    trainer = trainer_for(model, tmp_path / "second", BitFitCallback(config), train=train)
    before = state(model)
    message = r"checkpoint-2: its head has 3 labels, and adapter 'default' .* 5[\s\S]*num_labels=3"
    with pytest.raises(DeltaMismatchError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert state(model) == before


# --- files ---


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_config_is_one_sentence(way: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(prepared(way), tmp_path / "first")
    Path(checkpoint, "adapter_config.json").write_text('{"num_labels": ')
    with pytest.raises(DeltaFormatError, match=r"adapter_config\.json is not valid JSON"):
        trainer_for(prepared(way), tmp_path / "second").train(resume_from_checkpoint=checkpoint)
    Path(checkpoint, "adapter_config.json").write_text('{"peft_type": "BITFIT", "base_fingerprint": []}')
    with pytest.raises(ConfigError, match="`base_fingerprint` must be a mapping"):
        trainer_for(prepared(way), tmp_path / "second").train(resume_from_checkpoint=checkpoint)
    Path(checkpoint, "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(DeltaFormatError, match="of the method 'LORA'"):
        trainer_for(prepared(way), tmp_path / "second").train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_without_a_checkpoint_is_refused_by_the_trainer(way: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer_for(prepared(way), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- rates ---


@pytest.mark.parametrize("way", WAYS)
def test_a_rate_for_the_head_newly_added_is_one_sentence(way: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(prepared(way), tmp_path)
    trainer = trainer_for(prepared(way), tmp_path / "second", BitFitCallback(head_learning_rate=HEAD_RATE))
    message = r"of the head: 0\.03 instead of 0\.003[\s\S]*resumed run keeps the rates that its checkpoint"
    with pytest.raises(OptimizerError, match=message) as error:
        trainer.train(resume_from_checkpoint=checkpoint)
    assert "optimizer of your own" not in str(error.value)


@pytest.mark.parametrize("way", WAYS)
def test_another_rate_is_one_sentence(way: str, tmp_path: Path) -> None:
    # A stock Trainer goes on with the old rate and does not say so.
    checkpoint = checkpoint_of(prepared(way), tmp_path)
    trainer = trainer_for(prepared(way), tmp_path / "second", learning_rate=5e-3)
    with pytest.raises(OptimizerError, match=r"of the deltas: 0\.01 instead of 0\.005[\s\S]*its checkpoint"):
        trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("way", WAYS)
def test_a_schedule_that_lowers_the_rate_by_itself(way: str, tmp_path: Path) -> None:
    """`reduce_lr_on_plateau` notes no rate to begin from, so the one that the groups were made with counts."""
    values = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0, "threshold_mode": "abs"},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
    }
    whole = trainer_for(prepared(way), tmp_path, save_steps=2, **values)
    whole.train()
    lowered = {group["lr"] for group in whole.optimizer.param_groups}
    assert max(lowered) < RATE
    resumed = trainer_for(prepared(way), tmp_path / "second", **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(tuned(resumed.model), tuned(whole.model))
    resumed.train()  # goes on with the lowered rate, as for any model


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_of_other_groups_is_one_sentence(way: str, tmp_path: Path) -> None:
    # Of an adapter that a Trainer has trained without the callback.
    model = prepared(WRAPPED)
    if way == IN_PLACE:
        model = fresh()
        trainer_for(model, tmp_path)  # injects
    values = {"max_steps": 2, "save_steps": 2, "learning_rate": RATE, "report_to": [], "use_cpu": True}
    from transformers import TrainingArguments

    stock_trainer(model, TrainingArguments(str(tmp_path), **values)).train()
    checkpoint = tmp_path / "checkpoint-2"
    if way == IN_PLACE:
        from bitfit_hf.trainer.checkpoints import write_checkpoint

        write_checkpoint(model, "default", checkpoint)
    other = prepared(way)
    before = base_tensors(other)
    with pytest.raises(OptimizerError, match=r"parameter groups of \[1, 19\] tensors.*of \[10, 8, 1, 1\]"):
        trainer_for(other, tmp_path / "second").train(resume_from_checkpoint=str(checkpoint))
    assert same_tensors(base_tensors(other), before)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
