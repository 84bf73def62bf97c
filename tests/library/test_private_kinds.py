"""Private training of every kind of task and setting: an update is the sum of what a loop over examples clips."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, randomize_
from torch import nn
from trainer_tester import arguments, fresh, moved, rows, trainer_for, tuned
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithFlattening, TrainerCallback

from bitfit_hf import BitFitCallback, PrivacyConfig, PrivacyError, PrivateTrainer
from bitfit_hf.terms.structure import stock_root
from bitfit_hf.trainer.private.ledger import Ledger
from bitfit_hf.trainer.private.sampling import keyed_generator
from bitfit_hf.trainer.private.study import IGNORED, check_padding, study_batch

pytest.importorskip("opacus", reason="of the extra `private`")

COUNT, CLIP, RATE = 6, 0.05, 0.5
NO_NOISE = PrivacyConfig(noise_multiplier=0.0, max_grad_norm=CLIP)
NOISE = PrivacyConfig(noise_multiplier=1.0, accountant="rdp")


def bert(labels: int, problem: str) -> nn.Module:
    tiny = ARCHITECTURES["bert-sequence"].build().config.to_dict()
    return randomize_(
        BertForSequenceClassification(BertConfig(**{**tiny, "num_labels": labels, "problem_type": problem}))
    )


def task(kind: str) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """A model and examples of several lengths, some with few labels."""
    name = {"words": "bert-token", "next words": "gpt2-causal_lm"}.get(kind, "bert-sequence")
    data = rows(COUNT, name)
    generator = torch.Generator().manual_seed(1)
    for i, example in enumerate(data):
        if kind == "regression":
            example["labels"] = torch.randn((), generator=generator)
        elif kind == "several labels":
            example["labels"] = torch.randint(0, 2, (4,), generator=generator).float()
        elif kind in ("words", "next words"):
            example["labels"] = example["labels"].clone()
            example["labels"][:i] = IGNORED
    if kind == "several labels":
        return bert(4, "multi_label_classification"), data
    return (bert(1, "regression") if kind == "regression" else fresh(name)), data


def trainer_of(kind: str, folder: Path, privacy: PrivacyConfig = NO_NOISE, **values: Any) -> PrivateTrainer:
    model, data = task(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    common = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_steps": 1}
    callback = BitFitCallback(privacy=privacy, lr_scale="uniform")
    args = arguments(folder, **{**common, "per_device_train_batch_size": COUNT, **values})
    return PrivateTrainer(model, args, train_dataset=data, callbacks=[callback])


def by_hand(trainer: PrivateTrainer, smoothing: float = 0.0) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The step that clipping in a loop over examples gives, and the norms before clipping."""
    root, before = stock_root(trainer.model), tuned(trainer.model)
    named = {id(p): name for name, p in _live(trainer.model).items()}
    total = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    norms = []
    trainer.model.eval()
    for example in trainer.train_dataset:
        inputs = {key: value[None] for key, value in example.items()}
        labels = inputs["labels"]
        trainer.model.zero_grad()
        out = trainer.model(**inputs)
        loss = out.loss
        if smoothing:
            scores = out.logits.log_softmax(-1)
            if type(root).__name__.endswith("LMHeadModel"):
                scores, labels = scores[:, :-1], labels[:, 1:]
            kept = labels != IGNORED
            right = scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept].mean()
            loss = -(1 - smoothing) * right - smoothing * scores.mean(-1)[kept].mean()
        loss.backward()
        found = {
            named[id(p)]: p.grad.clone() for p in trainer.model.parameters() if id(p) in named and p.grad is not None
        }
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in found.values())))
        for name, gradient in found.items():
            total[name] += gradient * min(1.0, CLIP / norms[-1])
    trainer.model.zero_grad()
    return {name: before[name] - RATE * total[name] / COUNT for name in before}, norms


def _live(model: nn.Module) -> dict[str, nn.Parameter]:
    from bitfit_hf.tuner.state import delta_parameters, head_tensors

    return {**delta_parameters(model, "default"), **head_tensors(model, "default")}


def check_step(trainer: PrivateTrainer, tolerance: float = 1e-5, smoothing: float = 0.0) -> None:
    start = tuned(trainer.model)
    wanted, norms = by_hand(trainer, smoothing)
    assert max(norms) > CLIP, "some example is clipped"
    trainer.train()
    found = tuned(trainer.model)
    assert found.keys() == wanted.keys()
    step, error = (
        math.sqrt(sum(float((first[key] - second[key]).double().square().sum()) for key in wanted))
        for first, second in ((wanted, start), (found, wanted))
    )
    assert error <= tolerance * step
    assert step > 0


@pytest.mark.parametrize("kind", ["regression", "several labels", "words", "next words"])
def test_an_update_is_what_a_loop_clips(kind: str, tmp_path: Path) -> None:
    check_step(trainer_of(kind, tmp_path))


@pytest.mark.parametrize("kind", ["words", "next words"])
def test_label_smoothing_is_part_of_an_examples_own_loss(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(
        kind, tmp_path, label_smoothing_factor=0.2, per_device_train_batch_size=3, gradient_accumulation_steps=2
    )
    check_step(trainer, smoothing=0.2)


@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1e-5),
        ({"bf16": True}, 0.05),
        (
            {
                "train_sampling_strategy": "group_by_length",
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": COUNT,
            },
            1e-5,
        ),
    ],
    ids=["reentrant", "bf16", "parts by length"],
)
def test_settings_leave_the_update_as_it_is(values: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    check_step(trainer_of("words", tmp_path, **values), tolerance)


def test_a_base_of_torchao(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="an optional library, of the extra `integrations`")
    trainer = trainer_of("several labels", tmp_path)
    root = stock_root(trainer.model)
    kept = ("classifier", "pooler")
    torchao.quantize_(
        root,
        torchao.Int8WeightOnlyConfig(),
        lambda module, name: isinstance(module, nn.Linear) and not any(part in name for part in kept),
    )
    check_step(trainer)
    assert "Int8" in type(root.bert.encoder.layer[0].attention.self.query.base_layer.weight).__name__


# --- what the loss divides by ---


def test_a_first_label_that_does_not_count_is_found_by_trying() -> None:
    for kind, first in (("words", True), ("next words", False)):
        model, data = task(kind)
        batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
        studied = study_batch(model, batch)
        assert studied.first_label is first
        whole = (batch["labels"][:, 0 if first else 1 :] != IGNORED).sum(1).float()
        assert torch.equal(studied.counts(batch["labels"]), whole)


def test_a_last_label_that_does_not_count_is_refused() -> None:
    model, data = task("words")
    original = model.forward
    model.forward = lambda labels=None, **inputs: original(labels=labels[:, :-1].contiguous(), **_cut(inputs))
    batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
    with pytest.raises(PrivacyError, match="its last, does not enter the loss"):
        study_batch(model, batch)


def _cut(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[:, :-1] for name, value in inputs.items()}


# --- what the collator does ---


def test_padding_that_changes_an_example_is_refused(tmp_path: Path) -> None:
    def left(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        return {
            key: torch.stack([torch.cat([torch.full((longest - len(e[key]),), fill), e[key]]) for e in examples])
            for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED))
        }

    def right(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {
            name: value.flip(1) for name, value in left([{key: e[key].flip(0) for key in e} for e in examples]).items()
        }

    trainer = trainer_of("next words", tmp_path)
    data = [{key: value[: 3 + i % 3] for key, value in e.items()} for i, e in enumerate(rows(COUNT, "gpt2-causal_lm"))]
    for example in data:
        example["attention_mask"] = torch.ones_like(example["input_ids"])
    trainer.train_dataset = data
    trainer.data_collator = right
    trainer.train()
    bad = trainer_of("next words", tmp_path)  # GPT-2 counts positions from the padding on
    bad.train_dataset, bad.data_collator = data, left
    with pytest.raises(PrivacyError, match="padded to the length of its batch"):
        bad.train()


def test_padding_is_not_judged_where_a_collator_draws() -> None:
    model, data = task("words")
    batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
    other = {key: value[:1, :-1] for key, value in batch.items()} | {"input_ids": batch["input_ids"][:1, :-1] + 1}
    check_padding(model, batch, 0, other)


def test_a_collator_that_packs_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of("next words", tmp_path)
    trainer.train_dataset = [{"input_ids": e["input_ids"].tolist()} for e in rows(COUNT, "gpt2-causal_lm")]
    trainer.data_collator = DataCollatorWithFlattening()
    with pytest.raises(PrivacyError, match=r"not one row per example \(DataCollatorWithFlattening"):
        trainer.train()


# --- what is refused of models, and an adapter's past ---


def test_added_tokens_are_refused(tmp_path: Path) -> None:
    fresh().save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(model.config.vocab_size + 2)
    with pytest.raises(PrivacyError, match="rows of added tokens"):
        PrivateTrainer(
            model,
            arguments(tmp_path),
            train_dataset=rows(),
            callbacks=[BitFitCallback(privacy=NOISE)],
        )


def private(model: nn.Module, folder: Path, privacy: PrivacyConfig = NOISE, **values: Any) -> PrivateTrainer:
    args = arguments(folder, **{"max_steps": 2, **values})
    return PrivateTrainer(model, args, train_dataset=rows(), callbacks=[BitFitCallback(privacy=privacy)])


def test_a_stock_trainer_does_not_go_on_with_a_private_adapter(tmp_path: Path) -> None:
    trainer = private(fresh(), tmp_path / "a", save_steps=2)
    trainer.train()
    model: Any = trainer.model
    facts = dict(model.peft_config["default"].run.privacy)
    end = tuned(model)
    with pytest.raises(PrivacyError, match="comes from private training, and this Trainer would go on without"):
        trainer_for(model, tmp_path / "b").train()
    assert model.peft_config["default"].run.privacy == facts
    assert all(torch.equal(tensor, end[key]) for key, tensor in tuned(model).items())
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    with pytest.raises(PrivacyError, match="checkpoint-2 comes from private training"):
        trainer_for(fresh(), tmp_path / "c", max_steps=4).train(resume_from_checkpoint=checkpoint)
    model.peft_config["default"].run = None  # the guarantee is given up
    trainer_for(model, tmp_path / "b").train()
    assert model.peft_config["default"].run.privacy == {}


def test_an_adapter_that_was_trained_before_is_not_private_from_now_on(tmp_path: Path) -> None:
    model = fresh()
    trainer_for(model, tmp_path / "a").train()
    with pytest.raises(PrivacyError, match=r"has been trained before, not by this Trainer.*public_start=True"):
        private(model, tmp_path / "b").train()
    public = private(model, tmp_path / "c", PrivacyConfig(noise_multiplier=1.0, accountant="rdp", public_start=True))
    public.train()
    assert public.ledger.facts()["steps"] == 2


def test_training_in_between_is_noticed(tmp_path: Path) -> None:
    trainer = private(fresh(), tmp_path)
    trainer.train()
    trainer.train()  # goes on counting
    assert trainer.ledger.facts()["steps"] == 4
    with torch.no_grad():
        stock_root(trainer.model).classifier.modules_to_save["default"].weight.mul_(1.01)
    with pytest.raises(PrivacyError, match="has been trained before, not by this Trainer"):
        trainer.train()


def test_other_data_needs_another_trainer(tmp_path: Path) -> None:
    trainer = private(fresh(), tmp_path, max_steps=1)
    trainer.train()
    trainer.train_dataset = rows(8)
    with pytest.raises(PrivacyError, match="has 8 examples, and what was spent is of 16"):
        trainer.train()


def test_who_saves_before_the_end_says_more_than_is_spent(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(dict(model.peft_config["default"].run.privacy))
            control.should_training_stop = state.global_step == 3

    trainer = private(fresh(), tmp_path, max_steps=6, save_steps=2)
    trainer.add_callback(Saves())
    trainer.train()
    end = trainer.model.peft_config["default"].run
    assert [facts["steps"] for facts in seen] == [6, 6, 6]
    assert end.privacy["steps"] == 3
    assert all(facts["epsilon"] > end.privacy["epsilon"] for facts in seen)
    assert end.train_loss is None
    assert end.seconds is None


def test_parts_of_an_update_that_was_broken_off_are_forgotten(tmp_path: Path) -> None:
    trainer = trainer_of("words", tmp_path, max_steps=1)
    trainer.train()
    gradients = {p: torch.ones(1, *p.shape) for p in trainer._sum.parameters}
    trainer._sum.add(gradients, torch.ones(1))
    trainer.begin_update()
    trainer._sum.release(0.0, None, 1.0)
    assert not any(bool(p.grad.any()) for p in gradients)
    assert moved(trainer.model)


def test_a_key_makes_numbers_that_nobody_can_guess() -> None:
    first, second = keyed_generator(b"a" * 32, b"noise", b"1"), keyed_generator(b"a" * 32, b"noise", b"2")
    again = keyed_generator(b"a" * 32, b"noise", b"1")
    draws = torch.rand(200_000, generator=first)
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.004)
    assert float(draws.var()) == pytest.approx(1 / 12, rel=0.02)
    assert torch.equal(torch.rand(200_000, generator=again), draws)
    assert not torch.equal(torch.rand(200_000, generator=second), draws)
    words = keyed_generator(b"b" * 32).get_state().view(torch.int64)[3:627]
    assert len(set(words.tolist())) > 600, "all of the state, not what a seed of 32 bits makes of it"


def test_only_the_same_step_has_the_same_batch_and_noise() -> None:
    ledger, other = Ledger(NOISE, 100, 50), Ledger(NOISE, 100, 50)
    total = torch.arange(8.0)

    def noise() -> torch.Tensor:
        return ledger.noise(total, 1.0)

    def drawn() -> list[int]:
        ledger._drawn = 0  # as in a run that is resumed
        return ledger.draw()

    first, batch = noise(), ledger.draw()
    assert torch.equal(noise(), first)
    assert ledger.draw() != batch, "a second batch for the same update"
    assert drawn() == batch
    assert not torch.equal(other.noise(total, 1.0), first), "another key"
    assert other.draw() != batch
    total[3] += 1e-6
    assert not torch.equal(noise(), first), "another sum"
    ledger.state = lambda: b"other parameters"
    assert drawn() != batch
    ledger.state, total[3] = bytes, 3.0
    assert torch.equal(noise(), first)
    ledger.spend()
    assert not torch.equal(noise(), first), "another step, such as a second empty batch"
    assert drawn() != batch


@pytest.mark.slow
def test_a_run_that_is_resumed_otherwise_has_noise_of_its_own(tmp_path: Path) -> None:
    """Else the difference of the two ends would be that of two sums, without noise."""

    class Released(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    seen: dict[str, list[torch.Tensor]] = {}
    for name, steps in (("whole", 4), ("same", 4), ("longer", 6)):
        released = Released()
        released.seen = seen[name] = []
        callbacks = [BitFitCallback(privacy=NOISE), released]
        args = arguments(tmp_path / name, max_steps=steps, **({"save_steps": 1} if name == "whole" else {}))
        trainer = PrivateTrainer(fresh(), args, train_dataset=rows(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=None if name == "whole" else str(tmp_path / "whole" / "checkpoint-1"))
    assert [len(steps) for steps in seen.values()] == [4, 3, 5]
    assert all(torch.equal(a, b) for a, b in zip(seen["whole"][1:], seen["same"], strict=True))
    # Of the longer run the second step is that of the same state; its rate was another, and so is all from then on.
    assert torch.equal(seen["whole"][2], seen["longer"][1])
    difference = seen["whole"][3] - seen["longer"][2]
    noise = math.sqrt(2 * len(difference)) / 4  # of standard deviation 1 on the sum, divided by the expected batch
    assert float(difference.norm()) == pytest.approx(noise, rel=0.3)
