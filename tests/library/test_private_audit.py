"""An audit by canaries: what an attacker can tell of one example stays below the ε that is claimed.

Many tiny private runs, with and without one canary whose gradient is at the clip. The attacker sees the gradient that
an update releases, which is more than any model tells, and guesses by its part along the canary's. The bound on ε
from the guesses (Jagielski et al. 2020, with Clopper-Pearson intervals) has to be below the claim; and the same audit
has to catch an implementation without noise, and one that clips the batch instead of the example.
"""

from __future__ import annotations

import math

import pytest
import torch
from opacus.accountants import create_accountant
from scipy.stats import beta
from torch import nn

from bitfit_hf.trainer.private.gradients import PrivateSum, generator_noise

RUNS, NOISE, DELTA, CLIP = 4000, 1.0, 1e-3, 1.0


class ClipsTheBatch(PrivateSum):
    """Broken on purpose: bounds the mean gradient of a batch, as a Trainer's `max_grad_norm` does."""

    def add(self, gradients, scale):
        mean = {parameter: gradient.mean(0, keepdim=True) for parameter, gradient in gradients.items()}
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


def lower_bound(present: torch.Tensor, absent: torch.Tensor, confidence: float = 0.99) -> float:
    """The ε that the best threshold proves; half of the runs choose it and the other half judge it."""
    half = RUNS // 2
    best, bound = -math.inf, 0.0
    for threshold in torch.linspace(float(absent.min()), float(present.max()), 200):
        hits, alarms = (float((side[:half] > threshold).float().mean()) for side in (present, absent))
        value = math.log(max(hits - DELTA, 1e-9)) - math.log(alarms + 2 / half)
        if value > best:
            best = value
            hits, alarms = (int((side[half:] > threshold).sum()) for side in (present, absent))
            low = beta.ppf((1 - confidence) / 2, hits, half - hits + 1) if hits else 0.0
            high = beta.ppf((1 + confidence) / 2, alarms + 1, half - alarms) if alarms < half else 1.0
            bound = math.log((low - DELTA) / high) if low > DELTA else 0.0
    return bound


def claimed() -> float:
    accountant = create_accountant(mechanism="prv")
    accountant.history = [(NOISE, 1.0, 1)]
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
