"""A stock Trainer's own push carries a delta's files and our card; a stock model's push no base weights, no pickle."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_deltas import (
    ARCH,
    BASE,
    DELTA_FILES,
    PICTURE,
    TOKENIZER_FILES,
    load_base,
    make_tokenizer,
    names_a_path,
    put_base,
    save_base,
    tune,
)
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from tuner_tester import fill_

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig, DeltaIOError, PushError, TrainerSetupError

REPO = "alice/trained"
PUSHED = DELTA_FILES | PICTURE | {".gitignore"}


def rows(count: int = 4) -> list[dict[str, torch.Tensor]]:
    batch = {**ARCH.inputs(count), "labels": torch.arange(count) % 2}
    return [{name: values[i] for name, values in batch.items()} for i in range(count)]


def trainer_for(
    model: Any, folder: Path, *, callback: Any = BitFitCallback, tokenizer: Any = None, **values: Any
) -> Trainer:
    arguments = {
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "disable_tqdm": True,
        "hub_model_id": REPO,
        **values,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=tokenizer,
        callbacks=[callback],
    )


@pytest.fixture
def base(hub, hub_env) -> PreTrainedModel:
    put_base(hub)
    return load_base()


def holds(hub: Any, model: Any, repo_id: str = REPO) -> bool:
    """Whether the delta on the Hub is the model's."""
    return BiasDelta.from_pretrained(repo_id).digest == BiasDelta.from_model(model).digest


# --- the Trainer ---


def test_push_to_hub_gives_the_same_files_as_ours_and_our_card(hub, base, tmp_path):
    trainer = trainer_for(base, tmp_path / "out", tokenizer=make_tokenizer())
    trainer.train()
    trainer.evaluate()
    trainer.save_metrics("eval", {"eval_loss": 0.5})
    trainer.save_state()
    (tmp_path / "out" / "notes.txt").write_text("not for the Hub")
    trainer.push_to_hub()
    assert set(hub.files(REPO)) == PUSHED | TOKENIZER_FILES
    assert len(hub.commits(REPO)) == 2
    assert (tmp_path / "out" / "training_args.bin").exists(), "kept here, not pushed"
    assert names_a_path(hub.files(REPO), tmp_path) == []
    assert holds(hub, base)
    card = hub.files(REPO)["README.md"].decode()
    assert "<!-- bitfit_hf:" in card
    assert "generated from Trainer" not in card
    assert json.loads(hub.files(REPO)["adapter_config.json"])["revision"] == hub.commits(BASE)[0].oid


@pytest.mark.parametrize(("strategy", "commits"), [("end", 2), ("every_save", 4)])
def test_pushes_during_training(hub, base, tmp_path, strategy, commits):
    trainer = trainer_for(base, tmp_path / "out", push_to_hub=True, hub_strategy=strategy, hub_always_push=True)
    trainer.train()
    trainer.push_to_hub()
    history = hub.commits(REPO)
    assert len(history) == commits
    assert {name for commit in history[:-1] for name in commit.files} == PUSHED
    assert holds(hub, base)


def test_an_own_repository_without_a_user_s_name(hub, base, tmp_path):
    trainer = trainer_for(base, tmp_path / "trained", hub_model_id=None)
    trainer.push_to_hub()
    assert set(hub.files(REPO)) == PUSHED


@pytest.mark.parametrize("adapter_name", ["default", "rte"])
def test_a_wrapped_model(hub, base, tmp_path, adapter_name):
    model = get_peft_model(base, BitFitConfig(task_type="SEQ_CLS"), adapter_name=adapter_name)
    trainer = trainer_for(
        model,
        tmp_path / "out",
        callback=BitFitCallback(adapter_name=adapter_name),
        push_to_hub=True,
        hub_strategy="every_save",
        hub_always_push=True,
    )
    trainer.train()
    trainer.push_to_hub()
    assert {name for commit in hub.commits(REPO)[:-1] for name in commit.files} == PUSHED
    assert BiasDelta.from_pretrained(REPO).digest == BiasDelta.from_model(model, adapter_name).digest
    assert "<!-- bitfit_hf:" in hub.files(REPO)["README.md"].decode()
    model.save_pretrained(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "README.md").exists(), "stock saves write their card as ever"


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_push_pickles(hub, base, tmp_path, strategy):
    with pytest.raises(TrainerSetupError, match="optimizer's state as pickles"):
        trainer_for(base, tmp_path / "out", push_to_hub=True, hub_strategy=strategy)
    trainer = trainer_for(base, tmp_path / "out", hub_strategy=strategy)
    trainer.train()
    trainer.push_to_hub()  # by itself this never pushes checkpoints, whatever the strategy
    assert set(hub.files(REPO)) == PUSHED
    trainer.args.push_to_hub = True
    with pytest.raises(TrainerSetupError, match="optimizer's state as pickles"):
        trainer.push_to_hub()


def test_a_base_from_a_folder_is_refused_in_time(hub, hub_env, tmp_path):
    folder = str(save_base(tmp_path / "base"))
    model = load_base(folder)
    with pytest.raises(PushError, match="base_model_name_or_path='user/name'"):
        trainer_for(model, tmp_path / "out", push_to_hub=True)
    assert not hasattr(model, "peft_config"), "before anything is injected"
    trainer = trainer_for(model, tmp_path / "out")
    with pytest.raises(PushError, match="base_model_name_or_path='user/name'"):
        trainer.push_to_hub()
    assert set(hub.files(REPO)) == {".gitattributes"}, "the Trainer makes the repository, and nothing is in it"

    callback = BitFitCallback(BitFitConfig(base_model_name_or_path=BASE))
    trainer = trainer_for(load_base(folder), tmp_path / "named", callback=callback, push_to_hub=True)
    trainer.train()
    trainer.push_to_hub()
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert names_a_path(hub.files(REPO), tmp_path) == []


def test_what_a_user_wrote_stays(hub, base, tmp_path):
    trainer = trainer_for(base, tmp_path / "out")
    trainer.push_to_hub()
    hub.put(REPO, {"README.md": hub.files(REPO)["README.md"] + b"\n## Notes\n\nTrained on a rainy day.\n"})
    trainer.train()
    trainer.push_to_hub()
    card = hub.files(REPO)["README.md"].decode()
    assert "Trained on a rainy day." in card
    assert "| updates | 2 |" in card, "and the rest is up to date"


def test_rules_of_the_user_stay_in_the_gitignore(hub, base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gitignore").write_text("*.log\n")
    trainer = trainer_for(base, tmp_path / "out")
    trainer.push_to_hub()
    first = (tmp_path / "out" / ".gitignore").read_bytes()
    assert first.startswith(b"*.log\n")
    trainer.push_to_hub()
    assert (tmp_path / "out" / ".gitignore").read_bytes() == first


def test_our_push_into_a_repository_of_a_trainer(hub, base, tmp_path):
    trainer = trainer_for(base, tmp_path / "out")
    trainer.push_to_hub()

    class Speller:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "spelling.json").write_text("{}")

    BiasDelta.from_model(base).push_to_hub(REPO, tokenizer=Speller())
    assert set(hub.files(REPO)) == PUSHED | {"spelling.json"}


def test_a_hub_in_trouble_does_not_end_a_training(hub, base, tmp_path, caplog):
    trainer = trainer_for(base, tmp_path / "out", push_to_hub=True, hub_strategy="every_save", save_steps=2)
    mine = b"---\nlibrary_name: peft\n---\nmine\n"
    hub.put(REPO, {"README.md": mine})
    hub.fail_next(500, method="GET", path="/api/models/alice/trained$", times=20)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    hub.clear_faults()
    trainer._finish_current_push()
    assert "this push leaves it as it is" in caplog.text
    assert set(hub.files(REPO)) == PUSHED
    assert hub.files(REPO)["README.md"] == mine


@pytest.mark.parametrize("kind", ["in place", "wrapped"])
def test_a_folder_in_the_card_s_place(hub, base, tmp_path, kind):
    model = get_peft_model(base, BitFitConfig(task_type="SEQ_CLS")) if kind == "wrapped" else base
    trainer = trainer_for(model, tmp_path / "out", save_strategy="no")
    (tmp_path / "out" / "README.md").mkdir()
    with pytest.raises(DeltaIOError, match=r"README\.md is a folder, .*[Rr]emove or rename it"):
        trainer.push_to_hub()
    assert REPO not in hub.repos
    if kind == "wrapped":  # PEFT reads the card before it saves anything
        with pytest.raises(DeltaIOError, match=r"README\.md is a folder"):
            trainer.save_model()
    else:
        trainer.save_model()
        assert BiasDelta.from_pretrained(tmp_path / "out").digest == BiasDelta.from_model(base).digest
    (tmp_path / "out" / "README.md").rmdir()
    trainer.push_to_hub()
    assert set(hub.files(REPO)) == PUSHED


# --- a stock model's own push ---


@pytest.mark.parametrize("kind", ["in place", "wrapped"])
def test_a_stock_push_holds_no_base_weights_and_no_pickle(hub, base, kind):
    if kind == "in place":
        base.add_adapter(BitFitConfig())
        model: Any = fill_(base)
    else:
        model = tune(base)
    model.push_to_hub(REPO)
    files = hub.files(REPO)
    assert set(files) >= DELTA_FILES
    assert not [
        name for name in files if name.endswith((".bin", ".pt", ".pkl", ".pth")) or name == "model.safetensors"
    ]
    assert len(files["adapter_model.safetensors"]) < 20_000
    assert holds(hub, model)


def test_a_stock_push_of_a_language_model_holds_no_base_weights(hub, hub_env, tmp_path):
    from architectures import build

    build("gpt2-causal_lm").save_pretrained(tmp_path)
    hub.put("alice/gpt2", {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    model = AutoModelForCausalLM.from_pretrained("alice/gpt2")
    model.add_adapter(BitFitConfig())
    model.push_to_hub(REPO)
    assert set(hub.files(REPO)) == DELTA_FILES | {"generation_config.json"}
    assert holds(hub, model)
