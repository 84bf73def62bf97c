"""How the callback sets a Trainer up, what it refuses, and what it says."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from peft import LoraConfig, PeftModel, get_peft_model
from plain_modules import MLP
from trainer_tester import (
    IN_PLACE,
    WAYS,
    WRAPPED,
    arguments,
    fresh,
    losses,
    moved,
    prepared,
    rows,
    same,
    saved,
    stock_trainer,
    trainer_for,
    tuned,
)
from transformers import AutoModelForSequenceClassification, Trainer
from tuner_tester import base_tensors, fill_, same_tensors, state

from bitfit_hf import BitFitCallback, BitFitConfig
from bitfit_hf.errors import BitFitError, OptimizerError, TrainerSetupError

LOGGER = "bitfit_hf.trainer"


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name.startswith(LOGGER) and record.levelno == level
    ]


# --- what it makes of a model ---


@pytest.mark.parametrize("callback", [BitFitCallback, BitFitCallback()], ids=["class", "instance"])
@pytest.mark.parametrize("way", WAYS)
def test_a_stock_and_a_wrapped_model(way: str, callback: Any, tmp_path: Path) -> None:
    model = prepared(way)
    before = fresh().requires_grad_(False)  # as tuning leaves it, which can change the last bit of a matmul
    trainer = trainer_for(model, tmp_path, callback)
    assert trainer.model is model
    batch = {key: value.unsqueeze(0) for key, value in rows(1)[0].items()}
    assert torch.equal(model(**batch).logits, before(**batch).logits)
    trainer.train()
    assert moved(model)
    assert same_tensors(base_tensors(model), base_tensors(before))


def test_the_task_type_is_read_off_the_class(tmp_path: Path) -> None:
    found = {}
    for name in ("bert-sequence", "bert-token", "bert-question", "gpt2-causal_lm"):
        model = fresh(name)
        trainer_for(model, tmp_path, train=rows(4, name), max_steps=1).train()
        found[name] = model.peft_config["default"].task_type
        assert moved(model)
    assert list(found.values()) == ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM"]


def test_the_config_is_copied(tmp_path: Path) -> None:
    config = BitFitConfig(bias_terms="query")
    untouched = BitFitConfig(bias_terms="query").to_dict()
    callback = BitFitCallback(config)
    models = [fresh(), fresh("bert-token")]
    trainer_for(models[0], tmp_path, callback, max_steps=1).train()
    trainer_for(models[1], tmp_path, callback, train=rows(8, "bert-token"), max_steps=1).train()
    assert config.to_dict() == untouched
    assert [model.peft_config["default"].task_type for model in models] == ["SEQ_CLS", "TOKEN_CLS"]
    assert {len(tuned(model)) for model in models} == {4}


def test_a_config_read_from_a_delta_starts_a_new_one(tmp_path: Path) -> None:
    first = fresh()
    trainer_for(first, tmp_path, BitFitCallback(BitFitConfig(bias_terms="query"))).train()
    first.save_pretrained(tmp_path / "delta")

    config = BitFitConfig.from_pretrained(tmp_path / "delta")
    second = fresh()
    trainer = trainer_for(second, tmp_path, BitFitCallback(config))
    assert not any(tensor.any() for name, tensor in tuned(second).items() if "bitfit" in name)
    assert set(vars(second)) - set(vars(fresh())) == {"peft_config", "_hf_peft_config_loaded"} - set(vars(fresh()))
    trainer.train()
    assert same(tuned(first), tuned(second))


def test_other_adapters_are_left_alone(tmp_path: Path) -> None:
    model = prepared(WRAPPED)
    fill_(model)
    before = tuned(model)
    trainer_for(model, tmp_path, BitFitCallback(adapter_name="second")).train()
    assert moved(model, "second")
    assert same(tuned(model), before)


# --- several Trainers ---


@pytest.mark.parametrize("way", WAYS)
def test_a_second_trainer_goes_on_with_the_same_adapter(way: str, tmp_path: Path) -> None:
    config = BitFitConfig(bias_terms=["query", "value"])
    model = prepared(way, config)
    trainer_for(model, tmp_path, BitFitCallback(config)).train()
    first = tuned(model)
    modules = [name for name, _ in model.named_modules()]

    again = trainer_for(model, tmp_path, BitFitCallback(BitFitConfig(bias_terms=("b_v", "b_q"))))
    assert [name for name, _ in model.named_modules()] == modules
    assert same(tuned(model), first)
    again.train()
    assert not any(torch.equal(tensor, first[name]) for name, tensor in tuned(model).items())
    trainer_for(model, tmp_path, BitFitCallback).train()  # no config of its own: takes what is there


@pytest.mark.parametrize("way", WAYS)
def test_a_second_trainer_with_another_selection_is_refused(way: str, tmp_path: Path) -> None:
    model = prepared(way, BitFitConfig(bias_terms="query"))
    trainer_for(model, tmp_path, BitFitCallback(BitFitConfig(bias_terms="query")))
    before = state(model)
    other = BitFitCallback(BitFitConfig(bias_terms="value", layers_to_transform=1, train_untrained_pooler=False))
    message = (
        r"bias_terms=\['value'\] \(the model has \['query'\]\), layers_to_transform=1 \(the model has None\), "
        r"train_untrained_pooler=False \(the model has True\)"
    )
    with pytest.raises(TrainerSetupError, match=message):
        trainer_for(model, tmp_path, other)
    assert state(model) == before


def test_one_callback_for_several_trainers(tmp_path: Path) -> None:
    callback = BitFitCallback(BitFitConfig(bias_terms="query"), head_learning_rate=1e-3)
    alone, together = [], []
    for seed in range(3):
        model = fresh(seed=seed)
        one = BitFitCallback(BitFitConfig(bias_terms="query"), head_learning_rate=1e-3)
        trainer_for(model, tmp_path, one).train()
        alone.append(tuned(model))
    models = [fresh(seed=seed) for seed in range(3)]
    trainers = [trainer_for(model, tmp_path, callback) for model in models]
    for trainer in reversed(trainers):
        trainer.train()
    together = [tuned(model) for model in models]
    assert all(same(*pair) for pair in zip(alone, together, strict=True))
    assert not same(alone[0], alone[1])


TASKS = {"stance": 3, "intent": 5, "topic": 2}


def task_rows(labels: int) -> list[dict[str, torch.Tensor]]:
    return [{**row, "labels": torch.tensor(i % labels)} for i, row in enumerate(rows(8, seed=labels))]


@pytest.mark.parametrize("way", WAYS)
def test_tasks_in_a_loop_under_names_of_their_own(way: str, tmp_path: Path) -> None:
    base = fresh()
    model = base if way == IN_PLACE else None
    results = {}
    for task, labels in TASKS.items():
        config = BitFitConfig(num_labels=labels, id2label={i: f"{task}-{i}" for i in range(labels)})
        if way == WRAPPED and model is None:
            model = get_peft_model(base, config, adapter_name=task)
        trainer = trainer_for(
            model, tmp_path / task, BitFitCallback(config, adapter_name=task), train=task_rows(labels)
        )
        trainer.train()
        assert trainer.predict(task_rows(labels)).predictions.shape == (8, labels)
        assert base.config.id2label == {i: f"{task}-{i}" for i in range(labels)}
        results[task] = tuned(model, task)
        trainer.save_model(str(tmp_path / task / "delta"))
    assert all(same(tuned(model, task), results[task]) for task in TASKS)  # later tasks left them alone
    assert same_tensors(base_tensors(model), base_tensors(fresh()))
    for task, labels in TASKS.items():
        assert results[task]["classifier.weight"].shape[0] == labels
        folder = tmp_path / task / "delta" / (task if way == WRAPPED else "")
        assert same(saved(folder), results[task])


def test_tasks_in_a_loop_with_deleted_adapters(tmp_path: Path) -> None:
    base = fresh()
    for task, labels in TASKS.items():
        trainer_for(base, tmp_path, BitFitCallback(BitFitConfig(num_labels=labels)), train=task_rows(labels)).train()
        looped = tuned(base)
        base.delete_adapter("default")
        alone = fresh()
        trainer_for(alone, tmp_path, BitFitCallback(BitFitConfig(num_labels=labels)), train=task_rows(labels)).train()
        assert looped["classifier.weight"].shape == (labels, 32), task
        unequal = [name for name, tensor in tuned(alone).items() if not torch.equal(tensor, looped[name])]
        # A head of another size than the base's is drawn anew, so only where sizes agree runs are equal.
        assert labels != 3 or not unequal


@pytest.mark.parametrize("how", ["in place", "wrapped", "wrapped for training"])
def test_training_goes_on_with_a_loaded_delta(how: str, tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path / "base")
    load = AutoModelForSequenceClassification.from_pretrained
    first = load(tmp_path / "base")
    trainer_for(first, tmp_path / "run").train()
    first.save_pretrained(tmp_path / "delta")

    if how == "in place":
        model = load(tmp_path / "delta")
    else:
        trainable = how == "wrapped for training"
        model = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "delta", is_trainable=trainable)
    trainer = trainer_for(model, tmp_path / "more")
    assert same(tuned(model), tuned(first))
    trainer.train()
    twice = tuned(model)
    assert not any(torch.equal(tensor, twice[name]) for name, tensor in tuned(first).items())
    trainer.save_model(str(tmp_path / "twice"))
    assert same(tuned(load(tmp_path / "twice")), twice)

    trainer_for(first, tmp_path / "again").train()  # the model that was never saved and loaded
    assert same(tuned(first), twice)


# --- never something else in silence ---


def test_a_callback_added_late_is_an_error(tmp_path: Path) -> None:
    model = fresh()
    trainer = stock_trainer(model, arguments(tmp_path))
    trainer.add_callback(BitFitCallback())
    with pytest.raises(TrainerSetupError, match=r"pass it in `Trainer\(..., callbacks=\[BitFitCallback"):
        trainer.train()
    assert same_tensors(base_tensors(model), base_tensors(fresh()))

    for how in ("in place", "wrapped"):
        model = prepared(how)
        if how == "in place":
            model.add_adapter(BitFitConfig())
        trainer = stock_trainer(model, arguments(tmp_path))
        trainer.add_callback(BitFitCallback(head_learning_rate=1e-3))
        with pytest.raises(TrainerSetupError, match="added, or the model replaced, after the Trainer was made"):
            trainer.train()
        assert not moved(model)


@pytest.mark.parametrize("kind", ["stock", "in place", "wrapped"])
def test_a_model_replaced_after_the_trainer_was_made_is_an_error(kind: str, tmp_path: Path) -> None:
    trainer = trainer_for(fresh(), tmp_path)
    other = prepared(kind)
    if kind == "in place":
        other.add_adapter(BitFitConfig())
    trainer.model = other
    with pytest.raises(BitFitError, match=r"replaced|swapped"):
        trainer.train()
    assert same_tensors(base_tensors(other), base_tensors(fresh()))
    assert kind == "stock" or not moved(other)


@pytest.mark.parametrize("head_rate", [None, 3e-3])
@pytest.mark.parametrize("way", WAYS)
def test_parameters_unfrozen_by_the_user_are_an_error(way: str, head_rate: float | None, tmp_path: Path) -> None:
    model = prepared(way)
    trainer = trainer_for(model, tmp_path, BitFitCallback(head_learning_rate=head_rate))
    (name,) = [name for name, _ in model.named_parameters() if name.endswith("word_embeddings.weight")]
    model.get_parameter(name).requires_grad = True
    with pytest.raises(OptimizerError, match=rf"{name} (is in it|requires gradients)"):
        trainer.train()
    assert not moved(model)


def test_frozen_deltas_are_an_error(tmp_path: Path) -> None:
    model = fresh()
    trainer = trainer_for(model, tmp_path)
    for name, parameter in model.named_parameters():
        if "bitfit_" in name:
            parameter.requires_grad = False
    with pytest.raises(OptimizerError, match="No delta of the model requires gradients"):
        trainer.train()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["disabled", "merged", "another active"])
def test_an_adapter_that_does_not_count_is_an_error(what: str, way: str, tmp_path: Path) -> None:
    model = prepared(way)
    trainer = trainer_for(model, tmp_path)
    if what == "disabled":
        (model.base_model.disable_adapter_layers if way == WRAPPED else model.disable_adapters)()
    elif what == "merged":
        for module in model.modules():
            if hasattr(module, "merge") and hasattr(module, "bias_parameters"):
                module.merge()
    else:
        trainer_for(model, tmp_path, BitFitCallback(adapter_name="second"))
    with pytest.raises(TrainerSetupError, match="'default' is not the one that the model computes with"):
        trainer.train()


@pytest.mark.parametrize("way", WAYS)
def test_adapters_of_another_method_are_refused(way: str, tmp_path: Path) -> None:
    model = fresh()
    if way == WRAPPED:
        model = get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    else:
        model.add_adapter(LoraConfig(target_modules=["query"]))
    before = state(model)
    for name in ("default", "mine"):
        with pytest.raises(TrainerSetupError, match=r"adapters of another method \(LORA, Linear\)"):
            trainer_for(model, tmp_path, BitFitCallback(adapter_name=name))
    assert state(model) == before


def test_a_plain_module_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TrainerSetupError, match=r"MLP is no transformers model.*get_peft_model"):
        trainer_for(MLP(), tmp_path)


class PlainTask(MLP):
    """A plain module that the Trainer can train."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_wrapped_plain_module_works(tmp_path: Path) -> None:
    data = [{"x": torch.randn(10), "labels": torch.tensor(i % 5)} for i in range(8)]
    model = get_peft_model(PlainTask(), BitFitConfig(modules_to_save=["last"]))
    trainer = trainer_for(model, tmp_path, train=data, save_steps=2)
    trainer.train()
    assert moved(model)
    assert set(saved(tmp_path / "checkpoint-4")) == set(tuned(model))


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_sharding_a_stock_model_is_refused_with_the_remedy(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The Trainer itself would start the engine, which takes a GPU; so the event is sent by hand.
    model, args = fresh(), arguments(tmp_path)
    before = state(model)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    with pytest.raises(TrainerSetupError, match=rf"{engine} saves and loads adapters of a wrapped model only"):
        BitFitCallback().on_init_end(args, SimpleNamespace(), SimpleNamespace(), model=model)
    assert state(model) == before
    in_place = fresh()
    in_place.add_adapter(BitFitConfig())
    with pytest.raises(TrainerSetupError, match=r"get_peft_model\(model, BitFitConfig"):
        BitFitCallback().on_init_end(args, SimpleNamespace(), SimpleNamespace(), model=in_place)
    BitFitCallback().on_init_end(
        args, SimpleNamespace(), SimpleNamespace(), model=get_peft_model(model, BitFitConfig())
    )


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    model, args = fresh(), arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(TrainerSetupError, match=r"sees 2 GPUs[\s\S]*accelerate launch"):
        BitFitCallback().on_init_end(args, SimpleNamespace(), SimpleNamespace(), model=model)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_pushing_optimizer_pickles_is_refused(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **kwargs: None)  # it contacts the Hub
    for allowed in ("end", "every_save"):
        trainer_for(fresh(), tmp_path, push_to_hub=True, hub_strategy=allowed)
    trainer_for(fresh(), tmp_path, push_to_hub=False, hub_strategy=strategy)
    model = fresh()
    with pytest.raises(TrainerSetupError, match=f"hub_strategy='{strategy}' uploads whole checkpoints"):
        trainer_for(model, tmp_path, push_to_hub=True, hub_strategy=strategy)
    assert not hasattr(model, "peft_config")


def test_the_best_of_a_named_adapter_on_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    values = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    model = get_peft_model(fresh(), BitFitConfig(), adapter_name="rte")
    with pytest.raises(TrainerSetupError, match="would not load the adapter 'rte'"):
        trainer_for(model, tmp_path, BitFitCallback(adapter_name="rte"), **values)
    trainer_for(fresh(), tmp_path, BitFitCallback(adapter_name="rte"), **values).train()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config": LoraConfig()}, "`config` must be a BitFitConfig, got LoraConfig"),
        ({"config": {"bias_terms": "all"}}, "got dict"),
        ({"head_learning_rate": 0}, "must be a positive number, got 0"),
        ({"head_learning_rate": -1e-3}, "must be a positive number, got -0.001"),
        ({"head_learning_rate": float("nan")}, "must be a positive number, got nan"),
        ({"head_learning_rate": "1e-3"}, "must be a positive number, got '1e-3'"),
    ],
)
def test_arguments_of_the_callback_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainerSetupError, match=message):
        BitFitCallback(**values)


def test_a_failed_injection_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = fresh()
    before = state(model)
    with pytest.raises(BitFitError, match="no-such-module"):
        trainer_for(model, tmp_path, BitFitCallback(BitFitConfig(target_modules=["no-such-module"])))
    assert state(model) == before
    trainer_for(model, tmp_path).train()
    assert moved(model)


# --- what it says ---


def test_one_line_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    trainer_for(fresh(), tmp_path).train()
    model = fresh()
    total = sum(parameter.numel() for parameter in model.parameters())
    biases = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith("bert") and name.endswith("bias")
    )
    head = 32 * 3 + 3
    assert said(caplog, logging.INFO) == [
        f"BitFit trains {biases} bias parameters (all bias terms) and a head of {head}, of the model's {total:,}: "
        f"{100 * (biases + head) / total:.3f} %."
    ]

    caplog.clear()
    trainer_for(fresh(), tmp_path, BitFitCallback(BitFitConfig(bias_terms=["output", "query"]))).train()
    assert said(caplog, logging.INFO) == [
        f"BitFit trains {4 * 32} bias parameters (b_q, b_m3) and a head of {head}, of the model's {total:,}: "
        f"{100 * (4 * 32 + head) / total:.3f} %."
    ]
    assert not said(caplog, logging.WARNING)


def test_fused_biases_are_counted_by_slice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER)
    config = BitFitConfig(bias_terms="query")
    trainer_for(fresh("gpt2-sequence"), tmp_path, BitFitCallback(config), train=rows(4, "gpt2-sequence")).train()
    (line,) = said(caplog, logging.INFO)
    assert line.startswith("BitFit trains 64 bias parameters (b_q) and a head of 96, ")


@pytest.mark.parametrize("optim", ["adamw_torch", "own"])
def test_a_rate_for_full_fine_tuning_draws_one_warning(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(rate: float, callback: BitFitCallback) -> list[str]:
        caplog.clear()
        model = prepared(WRAPPED)
        if optim == "own":  # the rate of the arguments is not the one in use
            own = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=rate)
            trainer = trainer_for(model, tmp_path, callback, options={"optimizers": (own, None)}, learning_rate=1e-9)
        else:
            trainer = trainer_for(model, tmp_path, callback, learning_rate=rate, warmup_steps=2)
        trainer.train()
        trainer.train()
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {rate}
        return said(caplog, logging.WARNING)

    callback = BitFitCallback(lr_scale="uniform")
    (warning,) = run(5e-5, callback)
    assert warning.startswith("learning_rate=5e-05 is a rate for full fine-tuning")
    assert "1e-4 to 1e-3" in warning
    assert run(5e-5, callback) == []
    for rate in (1e-4, 1e-3, 4e-3, 1e-2):
        assert run(rate, BitFitCallback(lr_scale="uniform")) == []


def test_a_trainer_that_only_evaluates_hears_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_for(prepared(WRAPPED), tmp_path, learning_rate=5e-5).evaluate()
    assert not said(caplog, logging.WARNING)


# --- what it keeps of the run ---


def test_the_run_is_kept_for_the_card(tmp_path: Path) -> None:
    model = fresh()
    trainer = trainer_for(
        model,
        tmp_path,
        BitFitCallback(head_learning_rate=3e-3),
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        seed=7,
        lr_scheduler_type="cosine",
    )
    trainer.train()
    metrics = trainer.evaluate()
    run = model.peft_config["default"].run
    expected = {
        "learning_rate": 1e-2,
        "head_learning_rate": 3e-3,
        "train_batch_size": 8,
        "max_steps": 4,
        "num_train_epochs": None,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "optim": trainer.args.optim,
        "seed": 7,
        "mixed_precision": None,
    }
    assert {name: run.hyperparameters[name] for name in expected} == expected
    assert (run.steps, run.epochs, run.num_examples) == (4, 2.0, 16)
    assert run.metrics["loss"] == metrics["eval_loss"]
    assert not [name for name in run.metrics if name.endswith("per_second")]
    assert run.train_loss == pytest.approx(sum(losses(trainer)) / 4)
    assert run.seconds > 0
    assert run.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]  # its package may not name the build


def test_metrics_of_several_data_sets_are_kept_together(tmp_path: Path) -> None:
    model = fresh()
    data = {"matched": rows(8), "mismatched": rows(8, seed=1)}
    trainer = trainer_for(model, tmp_path, options={"eval_dataset": data}, eval_strategy="steps", eval_steps=2)
    trainer.train()
    kept = model.peft_config["default"].run.metrics
    assert kept["matched_loss"] != kept["mismatched_loss"]
    assert {"matched_loss", "mismatched_loss"} <= kept.keys()


def test_the_file_says_how_it_was_trained_and_names_no_path(tmp_path: Path) -> None:
    model = fresh()
    trainer_for(model, tmp_path, save_steps=4).train()
    text = (tmp_path / "checkpoint-4" / "adapter_config.json").read_text()
    assert json.loads(text)["run"]["hyperparameters"]["learning_rate"] == 1e-2
    assert str(tmp_path) not in text


def test_the_zoo_has_what_these_tests_use() -> None:
    assert {"bert-sequence", "bert-token", "bert-question", "gpt2-causal_lm", "gpt2-sequence"} <= ARCHITECTURES.keys()
