"""What an unmodified Trainer offers, with the callback: train, resume, best model, accumulation, precisions, files."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from packaging.version import Version
from peft import AutoPeftModelForSequenceClassification, PeftModel
from trainer_tester import (
    IN_PLACE,
    WAYS,
    WRAPPED,
    arguments,
    files,
    fresh,
    furthest,
    in_order,
    losses,
    moved,
    prepared,
    rows,
    same,
    saved,
    trainer_for,
    tuned,
)
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, TrainerCallback
from tuner_tester import base_tensors, needs_a_compiler, same_tensors

from bitfit_hf import BitFitCallback, BitFitConfig
from bitfit_hf.errors import DeltaMismatchError
from bitfit_hf.tuner.state import delta_parameters

TRAINER_LOG = "transformers.trainer"
MODEL_FILES = {"adapter_config.json", "adapter_model.safetensors"}
STATE_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == TRAINER_LOG and r.levelno >= logging.WARNING]


@pytest.fixture
def trainer_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The Trainer's own log; transformers keeps its records from the root logger."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger=TRAINER_LOG)
    return caplog


# --- train, evaluate, predict, save ---


@pytest.mark.parametrize("way", WAYS)
def test_train_evaluate_predict_save(way: str, tmp_path: Path) -> None:
    model = prepared(way)
    trainer = trainer_for(model, tmp_path, max_steps=20, **in_order())
    before = trainer.evaluate()["eval_loss"]
    result = trainer.train()
    after = trainer.evaluate()
    predicted = trainer.predict(rows())
    assert result.global_step == 20
    assert after["eval_loss"] < before - 0.1
    assert predicted.predictions.shape == (16, 3)
    assert predicted.metrics["test_loss"] == pytest.approx(after["eval_loss"])

    trainer.save_model(str(tmp_path / "saved"))
    assert set(files(tmp_path / "saved")) - {"README.md"} == {*MODEL_FILES, "training_args.bin"}
    assert same(saved(tmp_path / "saved"), tuned(model))


def checkpoint_files(way: str) -> set[str]:
    return {*MODEL_FILES, *STATE_FILES, *({"model.safetensors"} if way == IN_PLACE else set())}


@pytest.mark.parametrize("way", WAYS)
def test_files_of_a_checkpoint(way: str, tmp_path: Path) -> None:
    model = prepared(way)
    trainer_for(model, tmp_path, save_steps=4).train()
    found = files(tmp_path / "checkpoint-4")
    assert set(found) - {"README.md"} == checkpoint_files(way)

    expected = {"bert.embeddings.LayerNorm.bitfit_bias": (32,), "bert.pooler.dense.bitfit_bias": (32,)}
    for layer in range(2):
        for place, size in {
            "attention.self.query": 32,
            "attention.self.key": 32,
            "attention.self.value": 32,
            "attention.output.dense": 32,
            "attention.output.LayerNorm": 32,
            "intermediate.dense": 40,
            "output.dense": 32,
            "output.LayerNorm": 32,
        }.items():
            expected[f"bert.encoder.layer.{layer}.{place}.bitfit_bias"] = (size,)
    expected |= {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    tensors = saved(tmp_path / "checkpoint-4")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert same(tensors, tuned(model))

    scalars = sum(tensor.numel() for tensor in tensors.values())
    assert found["adapter_model.safetensors"] < 4 * scalars + 4096
    if way == IN_PLACE:
        live = saved(tmp_path / "checkpoint-4", "model.safetensors")
        assert set(live) == {
            name.replace("classifier.", "classifier.modules_to_save.default.")
            if name.startswith("classifier")
            else f"{name}.default"
            for name in expected
        }
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in live.items())
    assert found["optimizer.pt"] < 8 * scalars + 20_000  # two moments of what is trained, nothing of the base


def test_fused_and_named_adapters_in_a_checkpoint(tmp_path: Path) -> None:
    model = fresh("gpt2-sequence")
    callback = BitFitCallback(BitFitConfig(bias_terms="query"), adapter_name="mine")
    trainer_for(model, tmp_path, callback, train=rows(8, "gpt2-sequence"), save_steps=4).train()
    names = [f"transformer.h.{layer}.attn.c_attn.bitfit_bias" for layer in range(2)]
    shapes = {name: tuple(t.shape) for name, t in saved(tmp_path / "checkpoint-4").items()}
    assert shapes == {**dict.fromkeys(names, (32,)), "score.weight": (3, 32)}
    live = saved(tmp_path / "checkpoint-4", "model.safetensors")
    assert set(live) == {*(f"{name}.mine" for name in names), "score.modules_to_save.mine.weight"}


def test_only_training_args_is_a_pickle(tmp_path: Path) -> None:
    trainer = trainer_for(fresh(), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    pickles = [path.name for path in (tmp_path / "saved").rglob("*") if zipfile.is_zipfile(path) or _is_pickle(path)]
    assert pickles == ["training_args.bin"]


def _is_pickle(path: Path) -> bool:
    return path.read_bytes()[:1] == b"\x80"


@pytest.mark.parametrize("name", ["bert-sequence", "deberta-sequence", "vit-image"])
def test_what_is_saved_loads(name: str, tmp_path: Path) -> None:
    auto = AutoModelForImageClassification if name == "vit-image" else AutoModelForSequenceClassification
    fresh(name).save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base")
    trainer = trainer_for(model, tmp_path / "run", train=rows(8, name), save_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = trainer.predict(rows(8, name)).predictions

    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-4"):
        loaded = auto.from_pretrained(folder)
        assert same(tuned(loaded), tuned(model))
        assert same_tensors(base_tensors(loaded), base_tensors(model))
        found = trainer_for(loaded, tmp_path / "loaded", train=rows(8, name)).predict(rows(8, name)).predictions
        assert abs(found - expected).max() < 2e-6
    if name == "bert-sequence":
        assert same(tuned(AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "saved")), tuned(model))
        base = auto.from_pretrained(tmp_path / "base")
        assert same(tuned(PeftModel.from_pretrained(base, tmp_path / "saved")), tuned(model))


# --- resume ---

EACH_WAY_AND_RATE = pytest.mark.parametrize(
    ("way", "head_rate"),
    [
        (IN_PLACE, None),
        (WRAPPED, 3e-3),
        pytest.param(IN_PLACE, 3e-3, marks=pytest.mark.slow),
        pytest.param(WRAPPED, None, marks=pytest.mark.slow),
    ],
)


@EACH_WAY_AND_RATE
def test_resume_equals_an_uninterrupted_run(
    way: str, head_rate: float | None, tmp_path: Path, trainer_log: pytest.LogCaptureFixture
) -> None:
    # Dropout on, shuffled data, resumed in the middle of an epoch of four steps.
    def run(**values: Any) -> tuple[Any, Any]:
        model = prepared(way, dropout=0.1)
        callback = BitFitCallback(head_learning_rate=head_rate, dropout=True)
        arguments = {"max_steps": 10, "save_steps": 3, "weight_decay": 0.1, "warmup_steps": 2}
        return model, trainer_for(model, tmp_path / "run", callback, **{**arguments, **values})

    model, whole = run()
    whole.train()
    expected = tuned(model)
    shutil.rmtree(tmp_path / "run" / "checkpoint-10")  # `True` takes the last one
    checkpoints = [(str(tmp_path / "run" / "checkpoint-3"), 3), (True, 9)]
    if Version(transformers.__version__) < Version("5.18"):
        del checkpoints[1]  # after the first epoch a stock Trainer goes on with the rows in another order
    for checkpoint, step in checkpoints:
        again, resumed = run(save_strategy="no")
        resumed.train(resume_from_checkpoint=checkpoint)
        assert losses(resumed)[step:] == losses(whole)[step:]
        assert len(losses(resumed)) == 10
        assert same(tuned(again), expected)
        assert same_tensors(base_tensors(again), base_tensors(fresh()))
        rates = sorted({group["initial_lr"] for group in resumed.optimizer.param_groups})
        assert rates == pytest.approx(sorted({1e-2, 3e-2, head_rate or 1e-2}))
    assert not warnings_of(trainer_log)
    # Dropout had a part in it, so the random state came back as well.
    other = prepared(way, dropout=0.0)
    trainer_for(other, tmp_path / "other", BitFitCallback(head_learning_rate=head_rate), max_steps=10).train()
    assert not same(tuned(other), expected)


def test_resume_with_two_adapters_on_the_model(tmp_path: Path, trainer_log: pytest.LogCaptureFixture) -> None:
    def run(resume: bool) -> Any:
        model = fresh()
        trainer_for(model, tmp_path / "first", max_steps=2).train()
        callback = BitFitCallback(BitFitConfig(num_labels=3), adapter_name="second")
        trainer = trainer_for(model, tmp_path / "second", callback, save_steps=2)
        trainer.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-2") if resume else None)
        return model

    whole, resumed = run(resume=False), run(resume=True)
    for name in ("default", "second"):
        assert same(tuned(whole, name), tuned(resumed, name))
    assert not warnings_of(trainer_log)


def test_resume_with_tied_and_fused_biases(tmp_path: Path, trainer_log: pytest.LogCaptureFixture) -> None:
    for name in ("albert-sequence", "gpt2-sequence", "bert-masked_lm", "deberta-sequence"):
        models = [fresh(name), fresh(name)]
        train = rows(8, name)
        trainer_for(models[0], tmp_path / name, train=train, save_steps=2).train()
        second = trainer_for(models[1], tmp_path / name, train=train)
        second.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        assert same(tuned(models[0]), tuned(models[1])), name
    assert not warnings_of(trainer_log)


def checkpoint_of(model: Any, folder: Path, callback: Any) -> str:
    trainer_for(model, folder, callback, save_steps=2, save_only_model=True).train()
    return str(folder / "checkpoint-2")


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "way"),
    [
        ({"bias_terms": "query"}, {}, IN_PLACE),
        ({}, {"bias_terms": "query"}, IN_PLACE),
        ({"layers_to_transform": 0}, {"layers_to_transform": 1}, IN_PLACE),
        ({"bias_terms": "query"}, {}, WRAPPED),
        ({}, {"bias_terms": "query"}, WRAPPED),
    ],
)
def test_resuming_another_selection_is_an_error(
    saved_by: dict[str, Any], resumed_by: dict[str, Any], way: str, tmp_path: Path
) -> None:
    first, second = BitFitConfig(**saved_by), BitFitConfig(**resumed_by)
    checkpoint = checkpoint_of(prepared(way, first), tmp_path, BitFitCallback(first))
    trainer = trainer_for(prepared(way, second), tmp_path / "other", BitFitCallback(second))
    with pytest.raises(DeltaMismatchError, match=r"is missing|is not in the model|is not expected"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_resuming_under_another_name_is_an_error(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(fresh(), tmp_path, BitFitCallback())
    trainer = trainer_for(fresh(), tmp_path / "other", BitFitCallback(adapter_name="mine"))
    with pytest.raises(DeltaMismatchError, match=r"query.bitfit_bias.mine is missing"):
        trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("way", WAYS)
def test_resuming_in_the_other_way_is_an_error(way: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(prepared(way), tmp_path, BitFitCallback())
    other = WRAPPED if way == IN_PLACE else IN_PLACE
    trainer = trainer_for(prepared(other), tmp_path / "other")
    with pytest.raises(ValueError, match=r"a stock model again or a wrapped one again|checkpoint index"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_resuming_without_the_heads_rate_is_an_error(tmp_path: Path) -> None:
    trainer_for(fresh(), tmp_path, BitFitCallback(head_learning_rate=3e-3), save_steps=2).train()
    with pytest.raises(ValueError, match="parameter groups"):
        trainer_for(fresh(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_with_other_rates_is_an_error(tmp_path: Path) -> None:
    trainer_for(fresh(), tmp_path, BitFitCallback(head_learning_rate=3e-3), save_steps=2).train()
    trainer = trainer_for(fresh(), tmp_path, BitFitCallback(head_learning_rate=5e-3))
    with pytest.raises(
        ValueError, match=r"of the head: 0.003 instead of 0.005[\s\S]*keeps the rates that its checkpoint"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_loading_a_whole_state_dict_is_as_ever(tmp_path: Path) -> None:
    model = fresh()
    trainer_for(model, tmp_path)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = model.load_state_dict(whole)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    base = {name: tensor for name, tensor in whole.items() if "bitfit_" not in name and "modules_to_save" not in name}
    result = model.load_state_dict(base, strict=False)
    assert set(result.missing_keys) == set(whole) - set(base)
    some = dict(list(whole.items())[:5])
    assert set(model.load_state_dict(some, strict=False).missing_keys) == set(whole) - set(some)
    assert set(model.load_state_dict({}, strict=False).missing_keys) == set(whole)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(some)


# --- the best model ---


class Metrics(TrainerCallback):
    """Keeps the deltas and the head of every evaluation."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen[state.global_step] = tuned(model)


def scores(*values: float) -> Any:
    """A metric that takes these values, one per evaluation."""
    left = iter(values)
    return lambda prediction: {"score": next(left)}


@EACH_WAY_AND_RATE
def test_the_best_model_is_loaded_at_the_end(
    way: str, head_rate: float | None, tmp_path: Path, trainer_log: pytest.LogCaptureFixture
) -> None:
    model = prepared(way)
    kept = Metrics()
    trainer = trainer_for(
        model,
        tmp_path,
        BitFitCallback(head_learning_rate=head_rate),
        kept,
        options={"compute_metrics": scores(0.1, 0.7, 0.3, 0.2)},
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    assert same(tuned(model), kept.seen[4])
    assert same(tuned(model), saved(tmp_path / "checkpoint-4"))
    assert not same(kept.seen[4], kept.seen[8])
    assert not warnings_of(trainer_log)
    # The card quotes the model that was kept, not the last one.
    assert model.peft_config["default"].run.metrics["score"] == 0.7

    trainer.compute_metrics = scores(0.1, 0.2, 0.3, 0.4)
    best = tuned(model)
    trainer.train()  # and training can go on from there
    assert all(not torch.equal(delta, best[name]) for name, delta in delta_parameters(model, "default").items())
    assert model.peft_config["default"].run.metrics["score"] == 0.4


@pytest.mark.parametrize("way", WAYS)
def test_the_best_model_after_resuming(way: str, tmp_path: Path) -> None:
    values = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    values |= {"metric_for_best_model": "score", "max_steps": 6}
    model = prepared(way)
    trainer_for(model, tmp_path, options={"compute_metrics": scores(0.9, 0.2, 0.1)}, **values).train()
    again = prepared(way)
    resumed = trainer_for(again, tmp_path, options={"compute_metrics": scores(0.2, 0.1)}, **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(tuned(again), saved(tmp_path / "checkpoint-2"))
    assert same(tuned(again), tuned(model))


@pytest.mark.parametrize("way", WAYS)
def test_save_total_limit_keeps_the_best(way: str, tmp_path: Path) -> None:
    model = prepared(way)
    trainer = trainer_for(
        model,
        tmp_path,
        options={"compute_metrics": scores(0.1, 0.7, 0.3, 0.2)},
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        save_total_limit=2,
        save_only_model=True,
    )
    trainer.train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == ["checkpoint-4", "checkpoint-8"]
    for name in left:
        assert set(files(tmp_path / name)) - {"README.md"} == checkpoint_files(way) - {
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
        }
    assert same(tuned(model), saved(tmp_path / "checkpoint-4"))


# --- ways to compute the same ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head_rate", [None, 3e-3])
def test_accumulation_equals_a_big_batch(head_rate: float | None, way: str, tmp_path: Path) -> None:
    # The Trainer leaves the average over micro-batches to the loss, and a classifier's own loss does not take it: with
    # accumulation it comes to a multiple, for stock models too. So the loss is given.
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    results = []
    for size, times in ((8, 1), (2, 4)):
        model = prepared(way)
        trainer = trainer_for(
            model,
            tmp_path,
            BitFitCallback(head_learning_rate=head_rate),
            train=rows(32),
            options={"compute_loss_func": loss},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            optim="sgd",
            learning_rate=0.1,
            **in_order(),
        )
        trainer.train()
        results.append((losses(trainer), tuned(model)))
    (big_losses, big), (small_losses, small) = results
    assert len(big_losses) == 4
    assert big_losses == pytest.approx(small_losses, abs=1e-6)
    assert furthest(big, small) < 1e-6
    assert furthest(big, dict.fromkeys(big, torch.zeros(()))) > 1e-3


def test_accumulation_with_a_models_own_loss(tmp_path: Path) -> None:
    results = []
    for size, times in ((8, 1), (2, 4)):
        model = fresh("gpt2-causal_lm")
        values = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "optim": "sgd"}
        trainer = trainer_for(model, tmp_path, train=rows(32, "gpt2-causal_lm"), **values, **in_order())
        trainer.train()
        results.append((losses(trainer), tuned(model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert furthest(results[0][1], results[1][1]) < 1e-6
    assert moved(model)


SUBSET = {"bias_terms": ["query", "intermediate"]}  # leaves the embeddings' outputs without a gradient


CHECKPOINTED = ["bert-sequence", "vit-image", "gpt2-causal_lm", "swin-image", "whisper-audio"]


# Every other one is slow: all pairs of a model, a way and a kind of checkpointing are tried without these.
@pytest.mark.parametrize(
    ("name", "way", "reentrant"),
    [
        pytest.param(name, way, reentrant, marks=pytest.mark.slow if (number + of_way + reentrant) % 2 else ())
        for number, name in enumerate(CHECKPOINTED)
        for of_way, way in enumerate(WAYS)
        for reentrant in (False, True)
    ],
)
def test_gradient_checkpointing_changes_nothing(name: str, way: str, reentrant: bool, tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        config = BitFitConfig(**SUBSET)
        model = prepared(way, config, name, dropout=0.1)
        trainer = trainer_for(
            model,
            tmp_path,
            BitFitCallback(config, dropout=True),
            train=rows(8, name),
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if on else None,
        )
        trainer.train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == on
        assert moved(model)
        results.append((losses(trainer), tuned(model)))
    (plain_losses, plain), (checkpointed_losses, checkpointed) = results
    assert plain_losses == pytest.approx(checkpointed_losses, abs=1e-6)
    assert furthest(plain, checkpointed) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_bf16(way: str, tmp_path: Path) -> None:
    results = {}
    for bf16 in (False, True):
        model = prepared(way)
        trainer = trainer_for(model, tmp_path, bf16=bf16, save_steps=4)
        trainer.train()
        trainer.evaluate()
        assert {tensor.dtype for tensor in tuned(model).values()} == {torch.float32}
        assert moved(model)
        results[bf16] = losses(trainer)
        assert {tensor.dtype for tensor in saved(tmp_path / "checkpoint-4").values()} == {torch.float32}
    assert results[True] != results[False]
    assert results[True] == pytest.approx(results[False], abs=0.05)


@pytest.mark.parametrize("way", WAYS)
def test_bf16_full_eval_leaves_deltas_and_head_float32(way: str, tmp_path: Path) -> None:
    model = prepared(way)
    trainer = trainer_for(model, tmp_path, bf16_full_eval=True)
    trainer.train()
    trained = tuned(model)
    trainer.evaluate()
    assert {tensor.dtype for tensor in base_tensors(model).values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert same(tuned(model), trained)
    assert {tensor.dtype for tensor in tuned(model).values()} == {torch.float32}
    trainer.train()
    assert not same(tuned(model), trained)


@pytest.mark.parametrize("way", WAYS)
def test_a_bf16_base(way: str, tmp_path: Path) -> None:
    model = fresh().to(torch.bfloat16)
    base = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    if way == WRAPPED:
        from peft import get_peft_model

        model = get_peft_model(model, BitFitConfig())
    callback = BitFitCallback(lr_scale="uniform")
    trainer = trainer_for(model, tmp_path, callback, learning_rate=1e-4, lr_scheduler_type="constant", max_steps=3)
    trainer.train()
    # Steps of 1e-4 that bfloat16 would lose beside biases of 0.1.
    deltas = delta_parameters(model, "default").values()
    assert all(delta.dtype == torch.float32 and 0 < delta.abs().max() < 4e-4 for delta in deltas)
    assert same_tensors(base_tensors(model), base)


@needs_a_compiler
@pytest.mark.parametrize("way", [IN_PLACE, pytest.param(WRAPPED, marks=pytest.mark.slow)])
def test_torch_compile(way: str, tmp_path: Path) -> None:
    results = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = prepared(way)
        values = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = trainer_for(model, tmp_path / str(compiled), max_steps=2, save_steps=2, train=rows(8), **values)
        trainer.train()
        assert (trainer.model_wrapped is trainer.model) != compiled
        trainer.evaluate()
        trainer.save_model(str(tmp_path / str(compiled) / "saved"))
        results[compiled] = (losses(trainer), tuned(model))
    torch._dynamo.reset()
    assert results[False][0] == pytest.approx(results[True][0], abs=1e-5)
    assert furthest(results[False][1], results[True][1]) < 1e-4
    for folder in ("checkpoint-2", "saved"):
        plain, clean = (saved(tmp_path / str(compiled) / folder) for compiled in (False, True))
        assert plain.keys() == clean.keys()
        assert not [name for name in clean if "_orig_mod" in name]
    if way == IN_PLACE:
        live = saved(tmp_path / "True" / "checkpoint-2", "model.safetensors")
        assert live.keys() == saved(tmp_path / "False" / "checkpoint-2", "model.safetensors").keys()


@pytest.mark.parametrize("way", WAYS)
def test_a_second_train(way: str, tmp_path: Path) -> None:
    model = prepared(way)
    trainer = trainer_for(model, tmp_path, BitFitCallback(head_learning_rate=3e-3), weight_decay=0.1)
    trainer.train()
    first = tuned(model)
    groups = [(group["initial_lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups]
    trainer.train()
    assert [(group["initial_lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups] == groups
    assert all(not torch.equal(tensor, first[name]) for name, tensor in tuned(model).items())
    assert len(losses(trainer)) == 4


# --- more of the Trainer's options ---


@pytest.mark.parametrize(
    "values",
    [
        {"label_smoothing_factor": 0.2},
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"max_steps": -1, "num_train_epochs": 2},
        {"neftune_noise_alpha": 5.0},
        {"average_tokens_across_devices": False, "include_num_input_tokens_seen": "all"},
        {"max_grad_norm": 0.0},
        {"full_determinism": False, "seed": 3, "data_seed": 4},
        {"save_strategy": "epoch", "logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
        {"lr_scheduler_type": "cosine_with_restarts"},
        {"dataloader_drop_last": True, "remove_unused_columns": False},
    ],
    ids=lambda values: next(iter(values)),
)
@pytest.mark.parametrize("way", WAYS)
def test_options(way: str, values: dict[str, Any], tmp_path: Path) -> None:
    model = prepared(way)
    trainer = trainer_for(model, tmp_path, **values)
    trainer.train()
    assert moved(model)
    assert same_tensors(base_tensors(model), base_tensors(fresh()))


@pytest.mark.parametrize("way", WAYS)
def test_save_only_model(way: str, tmp_path: Path) -> None:
    model = prepared(way)
    trainer_for(model, tmp_path, save_steps=2, save_only_model=True).train()
    expected = checkpoint_files(way) - {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert set(files(tmp_path / "checkpoint-4")) - {"README.md"} == expected
    assert same(saved(tmp_path / "checkpoint-4"), tuned(model))


@pytest.mark.parametrize("way", WAYS)
def test_save_strategy_best(way: str, tmp_path: Path) -> None:
    model = prepared(way)
    trainer_for(
        model,
        tmp_path,
        options={"compute_metrics": scores(0.1, 0.7, 0.3, 0.8)},
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="score",
    ).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-8",
    ]
    assert all(set(files(path)) >= checkpoint_files(way) for path in tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_are_written_over_whole(way: str, tmp_path: Path) -> None:
    """A second run into the same folder leaves no tensor and no digest of the first."""
    for terms in ("all", "query"):
        config = BitFitConfig(bias_terms=terms)
        model = prepared(way, config)
        trainer_for(model, tmp_path, BitFitCallback(config), save_steps=4).train()
        assert same(saved(tmp_path / "checkpoint-4"), tuned(model))
        values = json.loads((tmp_path / "checkpoint-4" / "adapter_config.json").read_text())
        assert values["bias_terms"] == ("all" if terms == "all" else ["query"])
        leftovers = [name for name in files(tmp_path / "checkpoint-4") if name.startswith(".")]
        assert not leftovers


def test_arguments_are_quiet(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert args.report_to == []
    assert args.device.type == "cpu"
    assert {"bert-sequence", "vit-image", "swin-image", "whisper-audio"} <= ARCHITECTURES.keys()
