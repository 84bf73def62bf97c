"""Which parameter is trained in which group: rates, decay, and every way in which a Trainer gets its optimizer."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from peft import get_peft_model
from torch import nn
from trainer_tester import (
    WAYS,
    WRAPPED,
    Recorder,
    arguments,
    fresh,
    moved,
    prepared,
    rows,
    same,
    stock_trainer,
    trainer_for,
    tuned,
)
from transformers import Trainer, TrainerCallback
from tuner_tester import base_tensors, config_for, fill_, same_tensors

import bitfit_hf
from bitfit_hf import BitFitConfig
from bitfit_hf.errors import OptimizerError
from bitfit_hf.trainer.parameter_groups import check_optimizer

# One rate for all terms, so that a group is a kind of parameter; rates by term have `test_rates`.
BitFitCallback = functools.partial(bitfit_hf.BitFitCallback, lr_scale="uniform")
optimizer_groups = functools.partial(bitfit_hf.optimizer_groups, lr_scale="uniform")
RATE, HEAD_RATE, DECAY = 1e-2, 3e-3, 0.1
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
TRANSFORMERS = [arch for arch in ARCHITECTURES.values() if arch.is_transformers]


def names_of(model: nn.Module, group: dict[str, Any]) -> set[str]:
    """Names of a group's parameters, as the model has them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def is_delta(name: str) -> bool:
    return ".bitfit_" in f".{name}"


# --- optimizer_groups ---


def test_groups_of_bert() -> None:
    model = prepared(WRAPPED)
    groups = optimizer_groups(model, RATE, head_learning_rate=HEAD_RATE, weight_decay=DECAY)

    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("delta", RATE, 0.0),
        ("head", HEAD_RATE, DECAY),
        ("head_no_decay", HEAD_RATE, 0.0),
    ]
    deltas, head, plain = [names_of(model, group) for group in groups]
    assert len(deltas) == 18
    assert all(name.endswith("bitfit_bias.default") for name in deltas)
    assert head == {"base_model.model.classifier.modules_to_save.default.weight"}
    assert plain == {"base_model.model.classifier.modules_to_save.default.bias"}


def test_one_rate_for_all_by_default() -> None:
    groups = optimizer_groups(prepared(WRAPPED), RATE)
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(RATE, 0.0)}


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=str)
def test_groups_hold_every_trainable_parameter_once(arch: Architecture) -> None:
    model = get_peft_model(arch.build(), config_for(arch))
    held = [parameter for group in optimizer_groups(model, RATE) for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held})
    assert {id(parameter) for parameter in held} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("arch", TRANSFORMERS, ids=str)
def test_the_trainers_own_groups_decay_the_same(arch: Architecture) -> None:
    # Without a rate for the head the Trainer makes its groups itself, by the names of the parameters.
    model = arch.build()
    model.add_adapter(config_for(arch))
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups = {group["name"]: names_of(model, group) for group in optimizer_groups(model, RATE)}
    assert not groups["delta"] & decayed
    assert not groups.get("head_no_decay", set()) & decayed
    assert groups.get("head", set()) <= decayed


def test_only_trainable_adapters_are_grouped() -> None:
    model = prepared(WRAPPED)
    model.add_adapter("second", BitFitConfig(bias_terms="query"))
    model.set_adapter("second")
    (delta, *_) = optimizer_groups(model, RATE)
    assert len(delta["params"]) == 2
    assert all(name.endswith(".second") for name in names_of(model, delta))


def test_a_model_without_trainable_deltas_is_an_error() -> None:
    with pytest.raises(OptimizerError, match=r"BertForSequenceClassification has no trainable BitFit delta"):
        optimizer_groups(fresh(), RATE)
    frozen = get_peft_model(fresh(), BitFitConfig(inference_mode=True))
    with pytest.raises(OptimizerError, match="is_trainable=True"):
        optimizer_groups(frozen, RATE)
    with pytest.raises(ValueError):  # the built-in that a caller would catch
        optimizer_groups(frozen, RATE)


# --- the check before the first step ---


def test_check_names_what_is_wrong() -> None:
    model = prepared(WRAPPED)
    name = "bert.pooler.dense.bitfit_bias"
    good = optimizer_groups(model, RATE, weight_decay=DECAY)
    check_optimizer(model, torch.optim.SGD(good, lr=RATE))

    deltas = good[0]["params"]
    lost = [{**good[0], "params": deltas[:-1]}, *good[1:]]
    with pytest.raises(OptimizerError, match=rf"default:{name} is not in it"):
        check_optimizer(model, torch.optim.SGD(lost, lr=RATE))

    decayed = [{**good[0], "weight_decay": 0.1}, *good[1:]]
    with pytest.raises(OptimizerError, match=r"bitfit_bias is decayed by 0\.1[\s\S]*and 10 more"):
        check_optimizer(model, torch.optim.SGD(decayed, lr=RATE))

    stranger = [*good, {"params": fresh().parameters()}]
    with pytest.raises(OptimizerError, match=r"- 41 parameters of another model are in it"):
        check_optimizer(model, torch.optim.SGD(stranger, lr=RATE))

    frozen = model.get_parameter("base_model.model.bert.pooler.dense.base_layer.weight")
    with pytest.raises(OptimizerError, match=r"- base_model.model.bert.pooler.dense.base_layer.weight is in it"):
        check_optimizer(model, torch.optim.SGD([*good, {"params": [frozen]}], lr=RATE))

    frozen.requires_grad = True
    with pytest.raises(OptimizerError, match=r"pooler.dense.base_layer.weight requires gradients but is neither"):
        check_optimizer(model, torch.optim.SGD(good, lr=RATE))


def test_check_compares_the_rates_that_were_asked_for() -> None:
    model = prepared(WRAPPED)
    optimizer = torch.optim.SGD(optimizer_groups(model, RATE, head_learning_rate=HEAD_RATE), lr=RATE)

    def asked(rate: float, head_rate: float) -> Any:
        return lambda model: optimizer_groups(model, rate, head_learning_rate=head_rate)

    check_optimizer(model, optimizer, groups=asked(RATE, HEAD_RATE))
    with pytest.raises(OptimizerError, match=r"learning rate of the head: 0\.003 instead of 0.5"):
        check_optimizer(model, optimizer, groups=asked(RATE, 0.5))
    with pytest.raises(OptimizerError, match=r"learning rate of the deltas: 0\.01 instead of 0.5"):
        check_optimizer(model, optimizer, groups=asked(0.5, HEAD_RATE))


# --- weight decay in a Trainer ---


@pytest.mark.parametrize("head_rate", [None, HEAD_RATE])
@pytest.mark.parametrize("way", WAYS)
def test_weight_decay_shrinks_the_heads_weights_and_nothing_else(
    way: str, head_rate: float | None, tmp_path: Path
) -> None:
    model = prepared(way)
    trainer = trainer_for(model, tmp_path, BitFitCallback(head_learning_rate=head_rate), weight_decay=DECAY)
    fill_(model)
    before = tuned(model)

    optimizer = trainer.create_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # without gradients AdamW only decays

    after = tuned(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight"}
    shrunk = before["classifier.weight"] * (1 - (head_rate or RATE) * DECAY)
    assert torch.allclose(after["classifier.weight"], shrunk, rtol=1e-6)


@pytest.mark.parametrize("head_rate", [None, HEAD_RATE])
def test_groups_of_a_trainer(head_rate: float | None, tmp_path: Path) -> None:
    model = fresh()
    trainer = trainer_for(model, tmp_path, BitFitCallback(head_learning_rate=head_rate), weight_decay=DECAY)
    trainer.train()
    decayed = set()
    for group in trainer.optimizer.param_groups:
        for name in names_of(model, group):
            assert group["initial_lr"] == (RATE if is_delta(name) or head_rate is None else head_rate), name
            decayed |= {name} if group["weight_decay"] else set()
    assert decayed == {"classifier.modules_to_save.default.weight"}
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.0, DECAY}


@pytest.mark.parametrize("head_rate", [None, HEAD_RATE])
@pytest.mark.parametrize("way", WAYS)
def test_a_trainers_groups_are_those_of_optimizer_groups(way: str, head_rate: float | None, tmp_path: Path) -> None:
    model = prepared(way)
    trainer = trainer_for(model, tmp_path, BitFitCallback(head_learning_rate=head_rate), weight_decay=DECAY)
    expected = optimizer_groups(model, RATE, head_learning_rate=head_rate, weight_decay=DECAY)
    found = trainer.create_optimizer().param_groups
    assert len(found) == len(expected) == 3
    for group, wanted in zip(found, expected, strict=True):
        assert [group[key] for key in ("name", "lr", "weight_decay")] == [
            wanted[key] for key in ("name", "lr", "weight_decay")
        ]
        assert list(map(id, group["params"])) == list(map(id, wanted["params"]))


@pytest.mark.parametrize("head_rate", [None, HEAD_RATE])
def test_rates_changed_after_the_optimizer_was_made_are_refused(head_rate: float | None, tmp_path: Path) -> None:
    model = fresh()
    callback = BitFitCallback(head_learning_rate=head_rate)
    trainer = trainer_for(model, tmp_path, callback)
    trainer.train()
    trainer.args.learning_rate = 5e-3
    before = tuned(model)
    with pytest.raises(
        OptimizerError, match=r"deltas: 0.01 instead of 0.005[\s\S]*`trainer.optimizer = None`"
    ) as error:
        trainer.train()
    assert "optimizer of your own" not in str(error.value)
    assert same(tuned(model), before)

    trainer.optimizer = None  # as the message says
    trainer.train()
    assert {group["name"]: group["initial_lr"] for group in groups_of(trainer)} == {
        "delta": 5e-3,
        "head": head_rate or 5e-3,
        "head_no_decay": head_rate or 5e-3,
    }
    callback.head_learning_rate = 7e-3
    with pytest.raises(OptimizerError, match=r"of the head: .* instead of 0.007"):
        trainer.train()


def test_a_subclass_with_an_optimizer_of_its_own_keeps_it(tmp_path: Path) -> None:
    class Own(Trainer):
        def create_optimizer(self) -> torch.optim.Optimizer:  # as subclasses wrote it before it took a model
            if self.optimizer is None:
                trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
                self.optimizer = torch.optim.SGD(trained, lr=0.5)
            return self.optimizer

    data = rows()
    trainer = Own(fresh(), arguments(tmp_path), train_dataset=data, callbacks=[BitFitCallback()])
    trainer.train()
    assert [type(trainer.optimizer.optimizer), len(groups_of(trainer))] == [torch.optim.SGD, 1]
    assert groups_of(trainer)[0]["initial_lr"] == 0.5
    with pytest.raises(OptimizerError, match=r"of the head: 0.5 instead of 0.003[\s\S]*none to the callback"):
        Own(
            fresh(), arguments(tmp_path), train_dataset=data, callbacks=[BitFitCallback(head_learning_rate=HEAD_RATE)]
        ).train()


# --- the schedule ---


def factors(schedule: str, steps: int, warmup: int) -> list[float]:
    """The share of its base rate that a group has at each step, from the schedule's definition."""
    found = []
    for step in range(steps):
        progress = (step - warmup) / max(1, steps - warmup)
        if step < warmup:
            found.append(step / warmup)
        else:
            found.append(
                {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[schedule]
            )
    return found


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("way", WAYS)
def test_each_group_follows_the_schedule_from_its_own_rate(
    way: str, schedule: str, warmup: int, tmp_path: Path
) -> None:
    recorder = Recorder()
    trainer_for(
        prepared(way),
        tmp_path,
        BitFitCallback(head_learning_rate=HEAD_RATE),
        recorder,
        max_steps=8,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
    ).train()
    expected = [[base * factor for base in (RATE, HEAD_RATE, HEAD_RATE)] for factor in factors(schedule, 8, warmup)]
    assert len(recorder.rates) == 8
    assert recorder.rates == [pytest.approx(rates) for rates in expected]


# --- every optimizer of the Trainer ---


@pytest.mark.parametrize("head_rate", [None, HEAD_RATE])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizers(optim: str, head_rate: float | None, tmp_path: Path) -> None:
    model = fresh()
    trainer = trainer_for(
        model, tmp_path, BitFitCallback(head_learning_rate=head_rate), optim=optim, weight_decay=DECAY
    )
    head = tuned(model)["classifier.weight"]
    trainer.train()

    assert trainer.args.optim == optim
    assert moved(model)
    assert not torch.equal(tuned(model)["classifier.weight"], head)
    assert same_tensors(base_tensors(model), base_tensors(fresh()))
    rates = {is_delta(name): group["initial_lr"] for group in groups_of(trainer) for name in names_of(model, group)}
    assert rates == {True: RATE, False: head_rate or RATE}


def groups_of(trainer: Trainer) -> list[dict[str, Any]]:
    return trainer.optimizer.param_groups


@pytest.mark.parametrize(
    "optim",
    ["galore_adamw", "galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise", "lomo", "adalomo"],
)
def test_optimizers_that_take_no_groups_are_refused_by_name(optim: str, tmp_path: Path) -> None:
    model = fresh()
    with pytest.raises(OptimizerError, match=f"optim='{optim}'.*Use one that takes parameter groups"):
        trainer_for(model, tmp_path, optim=optim, optim_target_modules=["query"])
    assert not hasattr(model, "peft_config")


# --- optimizers of the user's own ---


def test_an_optimizer_for_the_base_is_refused(tmp_path: Path) -> None:
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    trainer = trainer_for(model, tmp_path, options={"optimizers": (optimizer, None)})
    before = base_tensors(model)
    with pytest.raises(OptimizerError, match=r"bitfit_bias is not in it[\s\S]*bitfit_hf.optimizer_groups"):
        trainer.train()
    assert same_tensors(base_tensors(model), before)


def test_an_optimizer_with_our_groups_is_taken(tmp_path: Path) -> None:
    model = prepared(WRAPPED)
    optimizer = torch.optim.AdamW(optimizer_groups(model, RATE, head_learning_rate=HEAD_RATE), lr=RATE)
    recorder = Recorder()
    trainer_for(
        model, tmp_path, BitFitCallback(), recorder, options={"optimizers": (optimizer, None)}, learning_rate=5e-5
    ).train()
    assert moved(model)
    assert recorder.rates[0] == [RATE, HEAD_RATE, HEAD_RATE]


def test_a_rate_for_the_head_beside_an_optimizer_with_another_is_refused(tmp_path: Path) -> None:
    model = prepared(WRAPPED)
    optimizer = torch.optim.AdamW(optimizer_groups(model, RATE), lr=RATE)
    callback = BitFitCallback(head_learning_rate=HEAD_RATE)
    trainer = trainer_for(model, tmp_path, callback, options={"optimizers": (optimizer, None)})
    with pytest.raises(OptimizerError, match=r"learning rate of the head: 0.01 instead of 0.003[\s\S]*none to the"):
        trainer.train()


@pytest.mark.parametrize("with_groups", [True, False])
def test_optimizer_cls_and_kwargs(with_groups: bool, tmp_path: Path) -> None:
    model = prepared(WRAPPED)
    kwargs: dict[str, Any] = {"lr": RATE}
    if with_groups:
        kwargs["params"] = optimizer_groups(model, RATE, head_learning_rate=HEAD_RATE)
    recorder = Recorder()
    options = {"optimizer_cls_and_kwargs": (torch.optim.SGD, kwargs)}
    trainer_for(model, tmp_path, BitFitCallback(), recorder, options=options).train()
    assert moved(model)
    assert set(recorder.rates[0]) == ({RATE, HEAD_RATE} if with_groups else {RATE})


# --- other Trainers in the process ---


def stock_groups(trainer: Trainer) -> list[tuple[int, float, float]]:
    trainer.optimizer = None
    groups = trainer.create_optimizer().param_groups
    return [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]


def test_other_trainers_keep_their_own_groups(tmp_path: Path) -> None:
    def full(args: Any = None) -> Trainer:
        return stock_trainer(fresh(), args or arguments(tmp_path, weight_decay=DECAY))

    before = full()
    expected = stock_groups(before)
    assert [rate for _, rate, _ in expected] == [RATE, RATE]

    trainer = trainer_for(fresh(), tmp_path, BitFitCallback(head_learning_rate=HEAD_RATE), weight_decay=DECAY)
    assert stock_groups(before) == stock_groups(full()) == expected
    trainer.train()
    assert len(groups_of(trainer)) == 3
    assert stock_groups(full()) == expected
    assert stock_groups(full(trainer.args)) == expected  # even with the very same arguments


def test_a_trainer_without_the_callback_keeps_its_groups_on_a_tuned_model(tmp_path: Path) -> None:
    model = prepared(WRAPPED)
    trainer_for(model, tmp_path, BitFitCallback(head_learning_rate=HEAD_RATE)).train()
    assert {rate for _, rate, _ in stock_groups(stock_trainer(model, arguments(tmp_path)))} == {RATE}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_trainers_that_share_their_arguments_stay_apart(order: tuple[int, ...], tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=1)
    rates = (None, HEAD_RATE, 5e-2)
    trainers = [trainer_for(fresh(), tmp_path, BitFitCallback(head_learning_rate=rate), args=args) for rate in rates]
    for i in order:
        trainers[i].train()
        assert {group["initial_lr"] for group in groups_of(trainers[i])} == {RATE, rates[i] or RATE}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_model_and_one_args_for_two_rates(order: tuple[int, int], tmp_path: Path) -> None:
    model, args = fresh(), arguments(tmp_path, max_steps=1)
    rates = (None, HEAD_RATE)
    trainers = [trainer_for(model, tmp_path, BitFitCallback(head_learning_rate=rate), args=args) for rate in rates]
    for i in order:
        trainers[i].train()
        assert {group["initial_lr"] for group in groups_of(trainers[i])} == {RATE, rates[i] or RATE}


def test_one_model_and_two_args_for_two_rates(tmp_path: Path) -> None:
    model = fresh()
    first = trainer_for(model, tmp_path, BitFitCallback(), max_steps=1)
    second = trainer_for(model, tmp_path, BitFitCallback(head_learning_rate=HEAD_RATE), max_steps=1)
    for trainer, rates in ((first, {RATE}), (second, {RATE, HEAD_RATE})):
        trainer.train()
        assert {group["initial_lr"] for group in groups_of(trainer)} == rates


def test_two_trainers_interleaved_step_by_step(tmp_path: Path) -> None:
    """One Trainer runs whole inside each evaluation of another, and both end as they do alone."""

    def run(folder: str, *callbacks: TrainerCallback, rate: float | None = None) -> dict[str, torch.Tensor]:
        model = fresh(dropout=0.1)
        callback = BitFitCallback(head_learning_rate=rate, dropout=True)
        trainer_for(model, tmp_path / folder, callback, *callbacks, max_steps=3).train()
        return tuned(model)

    class Inner(TrainerCallback):
        results: list[dict[str, torch.Tensor]] = []  # noqa: RUF012  # shared on purpose

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            with torch.random.fork_rng(devices=[]):
                self.results.append(run("inner", rate=HEAD_RATE))

    inner, outer = run("alone-inner", rate=HEAD_RATE), run("alone-outer")
    assert same(run("outer", Inner()), outer)
    assert len(Inner.results) == 3
    assert all(same(result, inner) for result in Inner.results)
    assert not same(inner, outer)


def test_saved_arguments_have_no_field_of_ours(tmp_path: Path) -> None:
    trainer = trainer_for(fresh(), tmp_path, BitFitCallback(head_learning_rate=HEAD_RATE))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert loaded == trainer.args
    assert loaded.to_dict().keys() == arguments(tmp_path).to_dict().keys()
