"""An audit by canaries: what an attacker can tell of one example stays below the ε that is claimed.

Many private updates, with and without one canary whose gradient is at the clip. The attacker sees the gradient that an
update releases, which is more than any model tells, and guesses by its part along the canary's. The bound on ε from
the guesses (Jagielski et al. 2020, with Clopper-Pearson intervals) has to be below the claim; and the same audit has
to catch an implementation without noise, one that clips the batch instead of the example, and one that takes the
canary into every batch. First of clipping and noise alone, then of a `PrivateTrainer`'s whole way: its sampler, a
model, per-example gradients, clipping, noise.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import beta
from torch import nn
from trainer_tester import arguments
from transformers import BertConfig, BertForSequenceClassification

import bitfit_hf.trainer.private.trainer as private_trainer
from bitfit_hf import BitFitCallback, PrivacyConfig, PrivateTrainer
from bitfit_hf.trainer.private.gradients import PrivateSum, generator_noise
from bitfit_hf.tuner.per_example import dense

create_accountant = pytest.importorskip("opacus.accountants", reason="of the extra `private`").create_accountant
RUNS, NOISE, DELTA, CLIP = 4000, 1.0, 1e-3, 1.0


class ClipsTheBatch(PrivateSum):
    """Broken on purpose: bounds the mean gradient of a batch, as a Trainer's `max_grad_norm` does."""

    def add(self, gradients, scale):
        mean = {
            parameter: (dense(g) * scale.view(-1, *[1] * parameter.dim())).mean(0, keepdim=True)
            for parameter, g in gradients.items()
        }
        count = len(scale)
        super().add(mean, torch.ones(1))
        for parameter in mean:
            self._sums[parameter] *= count


def scores(*, canary: bool, kind: type = PrivateSum, noise: float = NOISE) -> torch.Tensor:
    """Along the canary's gradient, what `RUNS` updates release."""
    parameter = nn.Parameter(torch.zeros(8))
    private = kind([parameter], CLIP)
    generator = torch.Generator().manual_seed(int(canary))
    found = []
    for _ in range(RUNS):
        gradients = torch.randn(4, 8, generator=generator) * 0.1
        if canary:
            gradients = torch.cat([gradients, torch.eye(8)[:1] * 1e3])
        private.add({parameter: gradients}, torch.ones(len(gradients)))
        private.release(noise, generator_noise(generator), 1.0)
        found.append(float(parameter.grad[0]))
    return torch.tensor(found)


def lower_bound(present: torch.Tensor, absent: torch.Tensor) -> float:
    """The ε that the best threshold proves; half of the runs choose it and the other half judge it."""
    half = len(present) // 2
    thresholds = torch.linspace(float(absent.min()), float(present.max()), 200)
    chosen = max(thresholds, key=lambda threshold: _proved(present[:half], absent[:half], threshold))
    return _proved(present[half:], absent[half:], chosen)


def _proved(present: torch.Tensor, absent: torch.Tensor, threshold: torch.Tensor, confidence: float = 0.99) -> float:
    count = len(present)
    hits, alarms = (int((side > threshold).sum()) for side in (present, absent))
    low = beta.ppf((1 - confidence) / 2, hits, count - hits + 1) if hits else 0.0
    high = beta.ppf((1 + confidence) / 2, alarms + 1, count - alarms) if alarms < count else 1.0
    return max(0.0, math.log((low - DELTA) / high)) if low > DELTA else 0.0


def claimed(noise: float = NOISE, rate: float = 1.0) -> float:
    accountant = create_accountant(mechanism="prv")
    accountant.history = [(noise, rate, 1)]
    return accountant.get_epsilon(delta=DELTA)


def audit(**values) -> float:
    return lower_bound(scores(canary=True, **values), scores(canary=False, **values))


@pytest.mark.slow
def test_the_audit_finds_less_than_is_claimed_but_something():
    assert 0.5 < audit() <= claimed()


@pytest.mark.slow
@pytest.mark.parametrize("broken", [{"noise": 0.0}, {"kind": ClipsTheBatch}], ids=["no noise", "clip per batch"])
def test_the_audit_catches_broken_variants(broken):
    assert audit(**broken) > claimed()


# --- a Trainer's whole way ---

UPDATES, COUNT, SHARE, LOUD = 1500, 128, 8, 0.9


def released(
    folder, *, canary: bool, kind: type = PrivateSum, noise: float = LOUD, always: bool = False
) -> torch.Tensor:
    """Along the canary's gradient, what the updates of one run release; the model stays where it is.

    Without the canary its label is one that losses leave out, so that both data sets have one size and one rate.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=16, max_position_embeddings=8, **sizes, **drop))
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([6.0, -6.0]))  # sure of label 0: only the canary has a gradient
        model.bert.pooler.dense.bias.normal_()
    data = [{"input_ids": torch.tensor([1, 2 + i % 8, 3]), "labels": torch.tensor(0)} for i in range(COUNT)]
    data[0]["labels"] = torch.tensor(1)
    privacy = PrivacyConfig(noise_multiplier=noise, max_grad_norm=0.1, accountant="rdp", target_delta=DELTA)
    args = arguments(folder, per_device_train_batch_size=SHARE, learning_rate=0.0, optim="sgd", max_steps=1)
    trainer = PrivateTrainer(model, args, train_dataset=data, callbacks=[BitFitCallback(privacy=privacy)])
    trainer.model(**{name: value[None] for name, value in data[0].items()}).loss.backward()
    found = {parameter: p.clone() for parameter in trainer.model.parameters() if (p := parameter.grad) is not None}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in found.values()))
    assert norm > 1, "the canary is clipped"
    if not canary:
        data[0]["labels"] = torch.tensor(-100)
    if always:
        drawn = trainer.ledger.draw
        trainer.ledger.draw = lambda: sorted({0, *drawn()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_trainer, "PrivateSum", kind)
        trainer.train()  # one update, which looks at model and loss; the others without the Trainer's loop around them
    scores = []
    while len(scores) < UPDATES:
        for batch in trainer.get_train_dataloader():
            trainer.begin_update()
            trainer.training_step(trainer.model, batch)
            scores.append(sum(float((parameter.grad * part).sum()) / norm for parameter, part in found.items()))
    assert trainer.ledger.steps == len(scores) + 1
    return torch.tensor(scores)


@pytest.fixture(scope="module")
def without_canary(tmp_path_factory) -> torch.Tensor:
    return released(tmp_path_factory.mktemp("absent"), canary=False)


@pytest.mark.slow
def test_the_audit_of_a_trainer_finds_less_than_is_claimed(without_canary, tmp_path):
    assert lower_bound(released(tmp_path, canary=True), without_canary) <= claimed(LOUD, SHARE / COUNT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [{"noise": 0.0}, {"kind": ClipsTheBatch}, {"always": True}],
    ids=["no noise", "clip per batch", "not drawn"],
)
def test_the_audit_of_a_trainer_catches_broken_variants(broken, without_canary, tmp_path):
    absent = without_canary if "noise" not in broken else released(tmp_path / "absent", canary=False, **broken)
    present = released(tmp_path / "present", canary=True, **broken)
    assert lower_bound(present, absent) > claimed(LOUD, SHARE / COUNT)
    if "noise" in broken:  # the rest is in order: what the canary adds is its clip, as often as it is drawn
        assert float(present.max()) == pytest.approx(0.1 / SHARE, rel=0.02)
        assert float((present > 0.05 / SHARE).float().mean()) == pytest.approx(SHARE / COUNT, abs=0.025)
