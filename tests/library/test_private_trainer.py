"""Private training from end to end: what is spent, resumed, recorded and refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from trainer_tester import arguments, fresh, moved, rows, trainer_for, tuned

from bitfit_hf import BitFitCallback, BitFitConfig, MissingDependencyError, PrivacyConfig, PrivacyError
from bitfit_hf.errors import TrainerSetupError
from bitfit_hf.trainer.private.config import require_opacus
from bitfit_hf.trainer.private.ledger import Ledger
from bitfit_hf.trainer.private.sampling import PoissonBatches, draw
from bitfit_hf.trainer.private.trainer import PrivateTrainer

create_accountant = pytest.importorskip("opacus.accountants", reason="of the extra `private`").create_accountant
NO_PRIVACY = PrivacyConfig(noise_multiplier=0.0, max_grad_norm=math.inf)
RDP = PrivacyConfig(noise_multiplier=1.0, accountant="rdp")


def private(folder, privacy=RDP, *, model=None, count=16, name="bert-sequence", config=None, callbacks=(), **values):
    return PrivateTrainer(
        model if model is not None else fresh(name),
        arguments(folder, **values),
        train_dataset=rows(count, name),
        callbacks=[BitFitCallback(config, privacy=privacy), *callbacks],
    )


def by_hand(facts: dict) -> float:
    accountant = create_accountant(mechanism=facts["accountant"])
    accountant.history = [(facts["noise_multiplier"], facts["sample_rate"], facts["steps"])]
    return accountant.get_epsilon(delta=facts["delta"])


def facts_of(trainer) -> dict:
    return trainer.model.peft_config["default"].run.privacy


# --- training ---


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_noise_and_clip_it_is_the_stock_trainer(tmp_path, accumulation):
    # Every example is in every batch, so that both see the same data; no Adam, which dead gradients lead astray.
    values = {"optim": "sgd", "max_steps": 3, "max_grad_norm": 0.0, "learning_rate": 0.1}
    cut = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 16 // accumulation}
    mine = private(tmp_path / "a", NO_PRIVACY, **values, **cut)
    mine.train()
    stock = trainer_for(fresh(), tmp_path / "b", train=rows(16), per_device_train_batch_size=16, **values)
    stock.train()
    found, wanted = tuned(mine.model), tuned(stock.model)
    assert found.keys() == wanted.keys()
    assert len(wanted) == 20
    for key in wanted:
        assert torch.allclose(found[key], wanted[key], rtol=0, atol=1e-6), key
    assert moved(mine.model)
    assert facts_of(mine)["steps"] == 3
    assert "epsilon" not in facts_of(mine)


def test_token_classification_and_causal_lm_train(tmp_path):
    for name in ("bert-token", "gpt2-causal_lm"):
        trainer = private(tmp_path / name, name=name, gradient_accumulation_steps=2)
        trainer.train()
        assert facts_of(trainer)["steps"] == 4
        assert all(bool(tensor.isfinite().all()) for tensor in tuned(trainer.model).values())


def test_empty_batches_are_updates_too(tmp_path):
    trainer = private(tmp_path, count=40, per_device_train_batch_size=1, max_steps=12)
    loader = trainer.get_train_dataloader()
    assert any("bitfit_empty_batch" in batch for batch in loader)
    trainer.train()
    assert facts_of(trainer)["steps"] == 12
    assert moved(trainer.model)


def test_batches_are_poisson():
    generator = torch.Generator().manual_seed(0)
    batches = PoissonBatches(0.05, 1, lambda: draw(200, 0.05, generator))
    drawn = [batch for _ in range(100) for batch in batches]
    assert len(drawn) == 100 * len(batches) == 2000
    sizes = torch.tensor([len(batch) for batch in drawn]).double()
    assert float(sizes.mean()) == pytest.approx(10, abs=0.3)
    assert float(sizes.var()) == pytest.approx(200 * 0.05 * 0.95, rel=0.12)
    often = torch.bincount(torch.tensor([i for batch in drawn for i in batch]), minlength=200).double()
    assert float(often.std()) == pytest.approx(math.sqrt(2000 * 0.05 * 0.95), rel=0.2)
    assert all(len(set(batch)) == len(batch) for batch in drawn)
    parts = PoissonBatches(0.05, 3, lambda: draw(200, 0.05, generator))
    assert len(list(parts)) == len(parts) == 60


# --- what is spent ---


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_a_target_is_met_and_recorded(tmp_path, accountant):
    config = PrivacyConfig(target_epsilon=3.0, accountant=accountant)
    trainer = private(tmp_path, config, count=64, num_train_epochs=1, max_steps=-1)
    trainer.train()
    facts = facts_of(trainer)
    assert 2.5 < facts["epsilon"] <= 3.0
    assert facts["epsilon"] == pytest.approx(by_hand(facts), rel=1e-12)
    assert (facts["steps"], facts["sample_rate"], facts["delta"]) == (16, 4 / 64, 1 / 640)
    trainer.save_model(str(tmp_path / "delta"))
    run = json.loads((tmp_path / "delta" / "adapter_config.json").read_text())["run"]
    assert run["privacy"] == facts
    assert "train_loss" not in run
    assert "max_grad_norm" not in run["hyperparameters"]
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "## Privacy" in card
    assert str(facts["epsilon"]) in card.replace("\\", "")
    with pytest.raises(PrivacyError, match="above target_epsilon=3"):
        trainer.train()


def test_a_killed_and_resumed_run_spends_and_ends_as_an_uninterrupted_one(tmp_path):
    whole = private(tmp_path, save_steps=3, max_steps=8, save_total_limit=None)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    saved = json.loads((checkpoint / "privacy.json").read_text())
    assert saved["history"] == [[1.0, 0.25, 3]]
    again = private(tmp_path / "again", max_steps=8)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert facts_of(again) == facts_of(whole)
    assert facts_of(again)["steps"] == 8
    assert facts_of(again)["epsilon"] == pytest.approx(by_hand(facts_of(again)), rel=1e-12)
    for key, tensor in tuned(whole.model).items():
        assert torch.equal(tuned(again.model)[key], tensor), key


def test_a_checkpoint_that_does_not_say_what_was_spent_is_refused(tmp_path):
    private(tmp_path, save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    ledger = checkpoint / "privacy.json"
    good = json.loads(ledger.read_text())
    for broken in (
        good | {"history": [[1.0, 0.25, 1]]},
        good | {"sample_rate": 0.1},
        good | {"noise_multiplier": 9.0},
    ):
        ledger.write_text(json.dumps(broken))
        with pytest.raises(PrivacyError, match=r"privacy\.json"):
            private(tmp_path / "x").train(resume_from_checkpoint=str(checkpoint))
    ledger.unlink()
    with pytest.raises(PrivacyError, match="not known what was spent"):
        private(tmp_path / "x").train(resume_from_checkpoint=str(checkpoint))


def test_what_was_spent_by_another_trainer_is_not_left_out(tmp_path):
    first = private(tmp_path / "a", max_steps=2, save_steps=1)
    first.train()
    spent = facts_of(first)
    for _ in range(2):
        with pytest.raises(PrivacyError, match=r"comes from private training already \(ε = .*would leave that out"):
            private(tmp_path / "b", model=first.model, max_steps=2).train()
        assert facts_of(first) == spent
    first.train()  # the same Trainer counts on
    assert facts_of(first)["steps"] == 4
    resumed = private(tmp_path / "a", model=first.model, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert facts_of(resumed)["epsilon"] > 0


def test_noise_does_not_follow_the_trainers_seed(tmp_path):
    ends = []
    for name in ("a", "b"):
        trainer = private(tmp_path / name, seed=7, max_steps=1, per_device_train_batch_size=16)
        trainer.train()
        ends.append(tuned(trainer.model))
    assert any(not torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


# --- what is refused ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither"),
        ({"target_epsilon": 1.0, "noise_multiplier": 1.0}, "both"),
        ({"target_epsilon": 0.0}, "positive"),
        ({"target_epsilon": -1.0}, "positive"),
        ({"target_epsilon": math.nan}, "positive"),
        ({"noise_multiplier": -1.0}, "at least 0"),
        ({"noise_multiplier": 1.0, "max_grad_norm": math.inf}, "infinite only"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0.0}, "max_grad_norm"),
        ({"noise_multiplier": 1.0, "target_delta": 1.5}, "target_delta"),
        ({"noise_multiplier": 1.0, "accountant": "gdp"}, "accountant"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(PrivacyError, match=message):
        PrivacyConfig(**values)


def test_bad_values_that_only_the_data_shows(tmp_path):
    with pytest.raises(PrivacyError, match=r"above 1/n"):
        private(tmp_path, PrivacyConfig(noise_multiplier=1.0, target_delta=0.5)).train()
    with pytest.raises(PrivacyError, match="No noise meets"):
        Ledger(PrivacyConfig(target_epsilon=1e-9, accountant="rdp"), 100, 100).plan(1000)
    with pytest.raises(PrivacyError, match="on average"):
        private(tmp_path, per_device_train_batch_size=17).train()


def test_a_noise_that_the_accountant_has_no_memory_for(monkeypatch):
    def too_large(*args, **kwargs):
        raise MemoryError("Unable to allocate 44.4 TiB")

    monkeypatch.setattr("opacus.accountants.prv.PRVAccountant.get_epsilon", too_large)
    with pytest.raises(PrivacyError, match=r"MemoryError: Unable to allocate 44.4 TiB.*more noise"):
        Ledger(PrivacyConfig(noise_multiplier=1e-4), 67_349, 256).plan(30)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataloader_num_workers": 1}, "dataloader_num_workers"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen"),
    ],
)
def test_arguments_that_break_the_guarantee(values, message, tmp_path):
    with pytest.raises(PrivacyError, match=message):
        private(tmp_path, **values)


def test_a_stock_trainer_states_no_epsilon(tmp_path):
    model = fresh()
    with pytest.raises(TrainerSetupError, match="PrivateTrainer"):
        trainer_for(model, tmp_path, BitFitCallback(privacy=RDP))
    assert not hasattr(model, "peft_config")
    with pytest.raises(TrainerSetupError, match="privacy=PrivacyConfig"):
        PrivateTrainer(fresh(), arguments(tmp_path), train_dataset=rows(), callbacks=[BitFitCallback()])


def test_batch_norms_are_refused(tmp_path):
    model = fresh()
    model.bert.norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(PrivacyError, match="batch norm"):
        private(tmp_path, model=model)


def test_a_head_without_per_example_gradients_is_refused(tmp_path):
    model = fresh()
    model.classifier = torch.nn.Bilinear(3, 3, 2)
    with pytest.raises(PrivacyError, match="Bilinear in the head"):
        private(tmp_path, model=model)


def test_the_trainers_clipping_is_switched_off_with_a_line(tmp_path, caplog):
    with caplog.at_level("INFO", "bitfit_hf"):
        trainer = private(tmp_path, max_grad_norm=1.0)
    assert trainer.args.max_grad_norm == 0.0
    assert "switched off" in caplog.text


def test_without_opacus(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(MissingDependencyError, match=r"bitfit-hf\[private\]"):
        require_opacus()


def test_secure_mode_trains_and_resumes(tmp_path: Path):
    config = PrivacyConfig(noise_multiplier=1.0, accountant="rdp", secure_mode=True)
    private(tmp_path, config, save_steps=2, max_steps=2).train()
    assert json.loads((tmp_path / "checkpoint-2" / "privacy.json").read_text())["key"] is None
    again = private(tmp_path, config, max_steps=4, config=BitFitConfig())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert facts_of(again)["steps"] == 4


@pytest.mark.parametrize("values", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_bf16_and_gradient_checkpointing(values, tmp_path):
    ends = []
    common = {"optim": "sgd", "max_steps": 2, "learning_rate": 0.1, "per_device_train_batch_size": 16}
    for name, extra in (("plain", {}), ("other", values)):
        trainer = private(tmp_path / name, NO_PRIVACY, **common, **extra)
        trainer.train()
        ends.append(tuned(trainer.model))
    plain, other = (torch.cat([tensor.flatten() for tensor in end.values()]) for end in ends)
    start = torch.cat([tensor.flatten() for tensor in tuned(private(tmp_path / "x", NO_PRIVACY).model).values()])
    tolerance = 0.05 if "bf16" in values else 1e-5
    assert float((plain - other).norm()) <= tolerance * float((plain - start).norm())
    assert float((other - start).norm()) > 0
