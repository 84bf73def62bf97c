"""Per-example gradients equal a loop over examples, and clipping bounds what an example contributes."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import ARCHITECTURES, randomize_
from peft import get_peft_model
from torch import nn

from bitfit_hf import BitFitConfig, PrivacyError
from bitfit_hf.terms.structure import stock_root
from bitfit_hf.trainer.parameter_groups import trainable_deltas, trainable_head
from bitfit_hf.trainer.private.gradients import PrivateSum, generator_noise, secure_noise
from bitfit_hf.trainer.private.study import study_batch
from bitfit_hf.tuner.per_example import PerExample, dense

BATCH = 4
MODELS = (
    "bert-sequence",
    "bert-token",
    "bert-choice",
    "roberta-sequence",
    "distilbert-sequence",
    "deberta-sequence",
    "gpt2-sequence",
    "gpt2-causal_lm",
    "vit-image",
    "albert-sequence",  # one layer that runs several times
)


def trainables(model: nn.Module) -> list[nn.Parameter]:
    decayed, plain = trainable_head(model)
    return list((trainable_deltas(model) | decayed | plain).values())


def tuned(name: str, **config) -> tuple[nn.Module, dict]:
    arch = ARCHITECTURES[name]
    model = get_peft_model(randomize_(arch.build()), BitFitConfig(**config))
    return model.train(), arch.inputs(BATCH) | arch.labels(BATCH)


def in_loop(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    rows = [[] for _ in trainables(model)]
    studied = study_batch(model, inputs)
    for i in range(BATCH):
        model.zero_grad()
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        loss = model(**one).loss * (studied.counts(one["labels"])[0] > 0)
        loss.backward()
        for row, parameter in zip(rows, trainables(model), strict=True):
            row.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    model.zero_grad()
    return [torch.stack(row) for row in rows]


def at_once(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    studied = study_batch(model, inputs)
    with PerExample(model, BATCH, studied.rows) as tape:
        model(**inputs).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing but the tape may see a gradient"
    scale = studied.scale(inputs["labels"])
    zero = [torch.zeros(BATCH, *p.shape) for p in trainables(model)]
    return [
        dense(tape.gradients.get(p, nothing)) * scale.view(-1, *[1] * p.dim())
        for p, nothing in zip(trainables(model), zero, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, False) for name in MODELS), ("bert-sequence", True), ("gpt2-sequence", True)],
)
def test_gradients_equal_a_loop_over_examples(name, checkpointing):
    config = {"bias_terms": ["query", "value", "intermediate"]} if name == "gpt2-sequence" else {}
    model, inputs = tuned(name, **config)
    wanted = in_loop(model, inputs)
    if checkpointing:
        stock_root(model).gradient_checkpointing_enable({"use_reentrant": False})
    found = at_once(model, inputs)
    assert len(found) == len(wanted) >= 5
    biggest = max(float(w.abs().max()) for w in wanted)
    for row, loop in zip(found, wanted, strict=True):
        # A dead gradient (b_k) is rounding noise: held against the largest of all.
        assert float((row - loop).norm()) <= 1e-5 * float(loop.norm()) + 1e-6 * biggest
    assert sum(float(w.abs().max()) > 1e-6 * biggest for w in wanted) > len(wanted) / 2


def test_the_forward_pass_is_the_non_private_one_bit_by_bit():
    model, inputs = tuned("bert-sequence")
    for parameter in trainables(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    plain = model(**inputs).logits
    with PerExample(model, BATCH):
        assert torch.equal(model(**inputs).logits, plain)


def test_examples_that_mix_are_refused():
    model, inputs = tuned("bert-sequence")
    layer = stock_root(model).bert.encoder.layer[0]
    original = layer.forward
    layer.forward = lambda hidden, *a, **k: original(hidden + hidden.mean(0, keepdim=True), *a, **k)
    with pytest.raises(PrivacyError, match="depends on the other examples"):
        study_batch(model, inputs)


def test_a_loss_that_is_no_mean_is_refused():
    model, inputs = tuned("bert-sequence")
    root = stock_root(model)
    original = root.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.loss = out.loss + out.logits.std(0).sum() if len(out.logits) > 1 else out.loss
        return out

    root.forward = forward
    with pytest.raises(PrivacyError, match="no mean over examples"):
        study_batch(model, inputs)


def test_clipping_bounds_an_example_that_is_huge_or_not_finite():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
    generator = torch.Generator().manual_seed(0)
    grads = {p: torch.randn(4, *p.shape, generator=generator) for p in parameters}

    def summed(*, without: int | None = None, factor: float = 1.0) -> torch.Tensor:
        private = PrivateSum(parameters, 0.5)
        keep = [i for i in range(4) if i != without]
        scale = torch.ones(4)
        scale[3] = factor
        private.add({p: g[keep] for p, g in grads.items()}, scale[keep])
        private.release(0.0, generator_noise(generator), 1.0)
        return torch.cat([p.grad.flatten() for p in parameters])

    for factor in (1.0, 1e6, 1e38):
        assert float((summed(factor=factor) - summed(without=3)).norm()) <= 0.5 * (1 + 1e-6)
    assert float((summed(factor=1e6) - summed(without=3)).norm()) == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(summed(factor=math.nan), summed(without=3))
    assert torch.equal(summed(factor=math.inf), summed(without=3))


@pytest.mark.parametrize("noise", [secure_noise, generator_noise(torch.Generator().manual_seed(0))])
def test_noise_has_its_standard_deviation(noise):
    drawn = noise(torch.zeros(200, 1000), 3.0)
    assert float(drawn.std()) == pytest.approx(3.0, rel=0.01)
    assert abs(float(drawn.mean())) < 0.03
    assert float((drawn.abs() > 6).float().mean()) == pytest.approx(0.0455, rel=0.05)
    assert not torch.equal(drawn, noise(torch.zeros(200, 1000), 3.0))


def test_noise_is_added_once_for_an_update_of_several_batches():
    parameter = nn.Parameter(torch.zeros(100_000))
    private = PrivateSum([parameter], 2.0)
    for _ in range(4):
        private.add({parameter: torch.zeros(1, 100_000)}, torch.ones(1))
    private.release(1.5, generator_noise(torch.Generator().manual_seed(0)), 10.0)
    assert float(parameter.grad.std()) == pytest.approx(1.5 * 2.0 / 10.0, rel=0.02)
