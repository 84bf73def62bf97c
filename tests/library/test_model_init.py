"""`Trainer(model_init=...)`, and the search for hyperparameters that needs it, with stock and wrapped models."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from peft import get_peft_model
from trainer_tester import (
    IN_PLACE,
    WAYS,
    arguments,
    files,
    fresh,
    losses,
    moved,
    prepared,
    same,
    saved,
    stock_trainer,
    trainer_for,
    tuned,
)
from transformers import TrainerCallback
from tuner_tester import base_tensors, fill_, same_tensors

from bitfit_hf import BitFitCallback, BitFitConfig
from bitfit_hf.errors import TrainerSetupError

HEAD_RATE = 3e-3
HEAD = {"classifier.weight", "classifier.bias"}


def by_init(way: str, folder: Path, callback: Any, **values: Any) -> Any:
    """A Trainer that makes its model itself; `made` keeps every one of them."""
    made: list[Any] = []

    def model_init() -> Any:
        made.append(prepared(way, dropout=0.1))
        return made[-1]

    trainer = trainer_for(None, folder, callback, options={"model_init": model_init}, **values)
    trainer.made = made
    return trainer


@pytest.mark.parametrize("head_rate", [None, HEAD_RATE])
@pytest.mark.parametrize("way", WAYS)
def test_it_trains_as_the_model_itself_does(way: str, head_rate: float | None, tmp_path: Path) -> None:
    callback = BitFitCallback(head_learning_rate=head_rate, dropout=True)
    trainer = by_init(way, tmp_path / "init", callback, save_steps=4)
    for times in (2, 3):  # the second `train` makes the model anew
        trainer.train()
        assert len(trainer.made) == times
        assert trainer.model is trainer.made[-1]
        assert moved(trainer.model)
        assert same_tensors(base_tensors(trainer.model), base_tensors(fresh()))
        assert same(saved(tmp_path / "init" / "checkpoint-4"), tuned(trainer.model))
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    head = dict.fromkeys(("head", "head_no_decay"), pytest.approx(head_rate or 3e-2))
    assert rates == {"delta": 1e-2, "delta:query+key+value+intermediate": pytest.approx(3e-2), **head}

    model = prepared(way, dropout=0.1)
    alone = trainer_for(model, tmp_path / "alone", callback, save_steps=4)
    alone.train()
    assert losses(alone) == losses(trainer)
    assert same(tuned(model), tuned(trainer.model))
    assert set(files(tmp_path / "alone")) == set(files(tmp_path / "init"))


@pytest.mark.parametrize("way", WAYS)
def test_resume_equals_an_uninterrupted_run(way: str, tmp_path: Path) -> None:
    callback = BitFitCallback(head_learning_rate=HEAD_RATE, dropout=True)
    whole = by_init(way, tmp_path, callback, max_steps=6, save_steps=3)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = by_init(way, tmp_path, callback, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(resumed)) == 6
    assert losses(resumed) == losses(whole)
    assert same(tuned(resumed.model), tuned(whole.model))


@pytest.mark.parametrize("way", WAYS)
def test_what_the_trainer_offers_works(way: str, tmp_path: Path) -> None:
    trainer = by_init(
        way,
        tmp_path,
        BitFitCallback(),
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        gradient_checkpointing=True,
        weight_decay=0.1,
    )
    trainer.train()
    assert same(tuned(trainer.model), saved(trainer.state.best_model_checkpoint))
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    assert same(saved(tmp_path / "saved"), tuned(trainer.model))


def test_a_model_init_that_takes_the_trial(tmp_path: Path) -> None:
    seen = []

    def model_init(trial: Any) -> Any:
        seen.append(trial)
        return fresh()

    trainer = trainer_for(None, tmp_path, options={"model_init": model_init})
    trainer.train()
    assert seen == [None, None]
    assert moved(trainer.model)


def test_under_another_name_beside_a_wrapped_models_own(tmp_path: Path) -> None:
    # As for a model that is passed itself: the adapters that it has are left alone.
    trainer = trainer_for(
        None,
        tmp_path,
        BitFitCallback(adapter_name="rte"),
        options={"model_init": lambda: fill_(get_peft_model(fresh(), BitFitConfig()))},
    )
    trainer.train()
    assert moved(trainer.model, "rte")
    assert same(tuned(trainer.model), tuned(fill_(get_peft_model(fresh(), BitFitConfig()))))


def test_a_model_that_does_not_fit_is_refused_as_ever(tmp_path: Path) -> None:
    first = [get_peft_model(fresh(), BitFitConfig(bias_terms="query"))]

    def model_init() -> Any:
        return first.pop() if first else get_peft_model(fresh(), BitFitConfig(bias_terms="value"))

    callback = BitFitCallback(BitFitConfig(bias_terms="query"))
    trainer = trainer_for(None, tmp_path, callback, options={"model_init": model_init})
    with pytest.raises(TrainerSetupError, match=r"bias_terms=\['query'\] \(the model has \['value'\]\)"):
        trainer.train()


def test_other_trainers_make_their_models_as_they_like(tmp_path: Path) -> None:
    ours = by_init(IN_PLACE, tmp_path, BitFitCallback())
    other = stock_trainer(None, ours.args, model_init=lambda: fresh())  # the very same arguments
    other.train()
    assert not hasattr(other.model, "peft_config")
    assert all(parameter.requires_grad for parameter in other.model.parameters())
    ours.train()
    assert moved(ours.model)


@pytest.mark.parametrize("way", WAYS)
def test_a_late_callback_is_an_error(way: str, tmp_path: Path) -> None:
    trainer = stock_trainer(None, arguments(tmp_path), model_init=lambda: prepared(way))
    trainer.add_callback(BitFitCallback())
    with pytest.raises(TrainerSetupError, match=r"callbacks=\[BitFitCallback"):
        trainer.train()


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_goes_to_another_process(way: str, tmp_path: Path) -> None:
    """A search with Ray sends the Trainer to its workers, by this package."""
    cloudpickle = pytest.importorskip("cloudpickle", reason="of the extra `recipes`")
    GradientState._reset_state()  # after a training in this process accelerate keeps in it what cannot be sent
    trainer = trainer_for(
        None,
        tmp_path,
        BitFitCallback(head_learning_rate=HEAD_RATE),
        options={"model_init": lambda: prepared(way, dropout=0.1)},
    )
    trainer.model = trainer.model_wrapped = None  # as the search does
    sent = cloudpickle.loads(cloudpickle.dumps(trainer))
    sent.train()
    trainer.train()
    assert sent.model is not trainer.model
    assert same(tuned(sent.model), tuned(trainer.model))
    assert [group["name"] for group in sent.optimizer.param_groups] == [
        "delta",
        "delta:query+key+value+intermediate",
        "head",
        "head_no_decay",
    ]


def test_a_trainer_is_freed_like_any_other(tmp_path: Path) -> None:
    for make in (stock_trainer, lambda model, args: trainer_for(model, tmp_path, args=args)):
        trainer = make(fresh(), arguments(tmp_path))
        trainer.train()
        gc.collect()
        gc.disable()
        try:
            seen = weakref.ref(trainer)
            del trainer
            assert seen() is None
        finally:
            gc.enable()


# --- the search ---


@pytest.mark.parametrize("way", WAYS)
def test_optuna_searches_the_rates(way: str, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna", reason="of the extra `test`")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rates = {"learning_rate": [1e-3, 1e-2, 3e-2], "head_learning_rate": [1e-3, 1e-2]}
    callback = BitFitCallback()
    seen: list[tuple[float, float, float]] = []

    def model_init(trial: Any) -> Any:
        if trial is not None:  # a rate that is no argument of the Trainer's is set where the trial is known
            callback.head_learning_rate = trial.suggest_categorical("head_learning_rate", rates["head_learning_rate"])
        return prepared(way)

    def objective(metrics: dict[str, float]) -> float:
        groups = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
        assert moved(trainer.model)
        seen.append((groups["delta"], groups["head"], metrics["eval_loss"]))
        return metrics["eval_loss"]

    trainer = trainer_for(None, tmp_path, callback, options={"model_init": model_init}, max_steps=4)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "learning_rate": trial.suggest_categorical("learning_rate", rates["learning_rate"]),
        },
        compute_objective=objective,
        backend="optuna",
        sampler=optuna.samplers.GridSampler(rates, seed=0),
        n_trials=6,
        direction="minimize",
    )
    assert sorted(found[:2] for found in seen) == sorted((a, b) for a in rates["learning_rate"] for b in (1e-3, 1e-2))
    assert best.objective == min(loss for _, _, loss in seen)
    assert len({loss for _, _, loss in seen}) == 6
    chosen = (best.hyperparameters["learning_rate"], best.hyperparameters["head_learning_rate"], best.objective)
    assert chosen in seen

    # The best trial again, by itself: the search has trained what a Trainer trains.
    model = prepared(way)
    again = trainer_for(
        model,
        tmp_path / "again",
        BitFitCallback(head_learning_rate=chosen[1]),
        learning_rate=chosen[0],
    )
    again.train()
    assert again.evaluate()["eval_loss"] == chosen[2]
    assert torch.isfinite(torch.tensor(chosen[2]))
    assert set(tuned(model)) >= HEAD


@pytest.mark.parametrize("way", WAYS)
def test_a_search_saves_each_trial_in_its_own_folder(way: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="of the extra `test`")
    values = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = by_init(way, tmp_path, BitFitCallback(), **values)
    best: list[tuple[str, bool]] = []

    def objective(metrics: dict[str, float]) -> float:
        return metrics["eval_loss"]

    class Look(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            folder = Path(state.best_model_checkpoint)
            best.append((folder.parent.name, same(saved(folder), tuned(model))))

    trainer.add_callback(Look())
    run = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True)},
        compute_objective=objective,
        backend="optuna",
        n_trials=2,
    )
    assert best == [("run-0", True), ("run-1", True)]
    base = sum(4 * tensor.numel() for tensor in fresh().state_dict().values())
    for trial in ("run-0", "run-1"):
        for step in (2, 4):
            found = files(tmp_path / trial / f"checkpoint-{step}")
            assert {"adapter_model.safetensors", "adapter_config.json"} <= set(found)
            assert ("model.safetensors" in found) == (way == IN_PLACE)
            assert sum(size for name, size in found.items() if name.endswith(".safetensors")) < base / 2
    assert not list(tmp_path.glob("checkpoint-*"))

    with pytest.raises(TrainerSetupError, match=r"no model to save[\s\S]*`train\(\)` again"):
        trainer.save_model()
    trainer.args.learning_rate = run.hyperparameters["learning_rate"]
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert same(saved(tmp_path / "saved"), tuned(trainer.model))
