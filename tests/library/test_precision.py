"""Half precision: bases of bfloat16 and float16, autocast, loss scaling, `torch.compile`, gradient checkpointing.

A bias near 1 in bfloat16 ignores updates below 2e-3. The deltas and the head are float32 whatever the base is, so they
move as they do on a float32 base; methods that train the base's own biases lose such updates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch import nn
from trainer_tester import (
    WAYS,
    WRAPPED,
    Tensors,
    arguments,
    fresh,
    losses,
    moved,
    rows,
    same,
    saved,
    stock_trainer,
    trainer_for,
    tuned,
)
from tuner_tester import base_tensors, config_for, same_tensors, tuned_parameters

from bitfit_hf import BitFitCallback, BitFitConfig

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
MODELS = ["bert-sequence", "vit-image", "qwen2-causal_lm", "llama-causal_lm", "bart-seq2seq_lm"]
# Gradients that pass through the tiny random attention of these are so small that bfloat16 turns the sign of some.
NOISY = {"qwen2-causal_lm", "llama-causal_lm"}
# The paper's smallest rate, at which every step is some 1e-4 long.
SLOW_AND_STEADY = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "max_steps": 30}


def model_in(dtype: torch.dtype, name: str = "bert-sequence", *, wrapped: bool = True) -> nn.Module:
    """The base in `dtype`, with the same values for every dtype: those that bfloat16 and float16 can hold."""
    model = fresh(name).to(torch.bfloat16).to(torch.float16).to(dtype)
    return get_peft_model(model, config_for(ARCHITECTURES[name])) if wrapped else model


def updates(model: nn.Module, folder: Path, name: str = "bert-sequence", **values: Any) -> Tensors:
    """The deltas after a run, without the keys': their gradient is rounding noise, or next to it."""
    trainer = trainer_for(model, folder, train=rows(32, name), **{**SLOW_AND_STEADY, **values})
    trainer.train()
    return {n: t for n, t in tuned(model).items() if "bitfit" in n and ".key." not in n and ".k_proj." not in n}


def correlation(first: Tensors, second: Tensors) -> float:
    assert first.keys() == second.keys()
    stacked = torch.stack([torch.cat([tensors[name].flatten() for name in first]) for tensors in (first, second)])
    return torch.corrcoef(stacked)[0, 1].item()


# Half-precision bases ------------------------------------------------------------------------------------------------


@HALVES
@pytest.mark.parametrize("name", MODELS)
def test_deltas_move_as_on_a_float32_base(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = updates(model_in(torch.float32, name), tmp_path, name)
    model = model_in(dtype, name)
    before = base_tensors(model)
    half = updates(model, tmp_path, name)
    assert max(delta.abs().max() for delta in half.values()) > 1e-3
    noisy = name in NOISY and dtype == torch.bfloat16
    assert correlation(reference, half) > (0.95 if noisy else 0.99)
    for term in half:
        assert correlation({term: reference[term]}, {term: half[term]}) > (0.9 if noisy else 0.95), term
    assert {tensor.dtype for tensor in tuned(model).values()} == {torch.float32}
    assert same_tensors(base_tensors(model), before)


@torch.no_grad()
def set_biases_near_one(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not name.startswith("classifier"):
            parameter.copy_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def last_hidden_state(model: nn.Module) -> torch.Tensor:
    inputs = ARCHITECTURES["bert-sequence"].inputs()
    return model.eval()(**inputs, output_hidden_states=True).hidden_states[-1]


def test_a_peer_loses_the_updates_that_the_deltas_keep(tmp_path: Path) -> None:
    """`LoraConfig(bias="all")` trains the base's biases where they are: 60 steps of 1e-4 leave them bit-identical."""
    steps = {**SLOW_AND_STEADY, "max_steps": 60}
    farthest = {}
    for dtype in (torch.float32, torch.bfloat16):
        peer = get_peft_model(
            set_biases_near_one(model_in(dtype, wrapped=False)),
            LoraConfig(bias="all", r=1, target_modules=["query"], task_type="SEQ_CLS"),
        )
        biases = {n: p for n, p in peer.named_parameters() if n.endswith(".bias") and "classifier" not in n}
        assert len(biases) == 18
        assert all(bias.requires_grad for bias in biases.values())
        before = {name: bias.detach().clone() for name, bias in biases.items()}
        stock_trainer(peer, arguments(tmp_path, **steps), train=rows(32)).train()
        farthest[dtype] = max((biases[name] - before[name]).abs().max().item() for name in biases)
    assert farthest[torch.float32] > 1e-3
    assert farthest[torch.bfloat16] == 0

    model = get_peft_model(set_biases_near_one(model_in(torch.bfloat16, wrapped=False)), BitFitConfig())
    before_training = last_hidden_state(model)
    ours = updates(model, tmp_path, **steps)
    reference = updates(
        get_peft_model(set_biases_near_one(model_in(torch.bfloat16, wrapped=False)).float(), BitFitConfig()),
        tmp_path,
        **steps,
    )
    assert correlation(reference, ours) > 0.99
    assert max(delta.abs().max() for delta in ours.values()) > 1e-3
    assert not torch.equal(last_hidden_state(model), before_training)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluating_in_half_precision_leaves_the_deltas(option: str, way: str, tmp_path: Path) -> None:
    model = model_in(torch.float32, wrapped=way == WRAPPED)
    trainer = trainer_for(model, tmp_path, **{option: True})
    trainer.train()
    trained = tuned(model)
    trainer.evaluate()
    half = torch.bfloat16 if option.startswith("bf16") else torch.float16
    assert {t.dtype for t in base_tensors(model).values() if t.is_floating_point()} == {half}
    assert same(tuned(model), trained)
    assert {tensor.dtype for tensor in tuned(model).values()} == {torch.float32}


# Autocast and loss scaling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_deltas_move_under_bfloat16_autocast_as_without(name: str, tmp_path: Path) -> None:
    """bfloat16 changes the gradients' last digits, and Adam the sign of a step where a gradient is near zero."""
    reference = updates(model_in(torch.float32, name), tmp_path, name)
    cast = updates(model_in(torch.float32, name), tmp_path, name, bf16=True)
    assert not same(reference, cast)
    assert correlation(reference, cast) > (0.95 if name in NOISY else 0.99)


def scaled_steps(model: nn.Module, *, autocast: bool, scale: float, steps: int = 30) -> tuple[Tensors, list[float]]:
    """A float16 loop with loss scaling, which the Trainer leaves out on CPUs; deltas and the scale of each step."""
    name = "bert-sequence"
    trained = dict(tuned_parameters(model))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    arch, scales = ARCHITECTURES[name], []
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = model(**arch.inputs(8, seed=step), **arch.labels(8, seed=step)).loss
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        assert {p.grad.dtype for p in trained.values() if p.grad is not None} == {torch.float32}
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    kept = {n: t for n, t in tuned(model).items() if "bitfit" in n and ".key." not in n}
    return kept, scales


@pytest.mark.parametrize("base", [torch.float32, torch.float16], ids=str)
def test_float16_with_loss_scaling(base: torch.dtype) -> None:
    arch = ARCHITECTURES["bert-sequence"]
    reference, _ = scaled_steps(model_in(torch.float32), autocast=False, scale=1.0)
    half, scales = scaled_steps(model_in(base), autocast=base == torch.float32, scale=2.0**10)
    assert set(scales) == {2.0**10}
    assert correlation(reference, half) > 0.99
    model = model_in(base)
    with torch.autocast("cpu", torch.float16):
        assert model(**arch.inputs(), output_hidden_states=True).hidden_states[-1].isfinite().all()


def test_a_scale_that_overflows_skips_the_step_and_is_lowered() -> None:
    model = model_in(torch.float16)
    untouched, scales = scaled_steps(model, autocast=False, scale=2.0**40, steps=1)
    assert not any(delta.any() for delta in untouched.values())
    deltas, scales = scaled_steps(model, autocast=False, scale=2.0**24, steps=30)
    assert scales[0] > scales[-1]
    assert all(delta.any() for delta in deltas.values())
    assert all(delta.isfinite().all() for delta in deltas.values())


def test_a_peer_cannot_scale_the_loss_on_a_float16_base() -> None:
    config = LoraConfig(bias="all", r=1, target_modules=["query"], task_type="SEQ_CLS")
    peer = get_peft_model(model_in(torch.float16, wrapped=False), config)
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad])
    scaler = torch.amp.GradScaler("cpu")
    arch = ARCHITECTURES["bert-sequence"]
    with torch.autocast("cpu", torch.float16):
        loss = peer(**arch.inputs(), **arch.labels()).loss
    scaler.scale(loss).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.unscale_(optimizer)


# Gradient checkpointing ----------------------------------------------------------------------------------------------


HALF_PRECISION = [
    *((name, how) for name in MODELS for how in ("bfloat16 base", "float16 base", "bfloat16 autocast")),
    ("swin-image", "bfloat16 autocast"),  # as a half-precision base it takes no float32 images
]


# Every other one is slow: all pairs of a model, a precision and a kind of checkpointing are tried without these,
# but for Swin with the plain kind.
@pytest.mark.parametrize(
    ("name", "how", "reentrant"),
    [
        pytest.param(
            *case,
            reentrant,
            marks=pytest.mark.slow if (number + reentrant) % 2 else (),
            id="-".join([*case, *["reentrant"] * reentrant]),
        )
        for number, case in enumerate(HALF_PRECISION)
        for reentrant in (False, True)
    ],
)
def test_gradient_checkpointing_in_half_precision(name: str, how: str, reentrant: bool, tmp_path: Path) -> None:
    """With a selection that leaves the embeddings frozen, where the reentrant kind loses the gradients by itself."""
    dtype = {"bfloat16 base": torch.bfloat16, "float16 base": torch.float16}.get(how, torch.float32)
    terms = ["query", "intermediate"]
    results = []
    for on in (False, True):
        model = model_in(dtype, name, wrapped=False)
        config = config_for(ARCHITECTURES[name], bias_terms=terms)
        trainer = trainer_for(
            model,
            tmp_path,
            BitFitCallback(config),
            train=rows(8, name),
            max_steps=2,
            optim="sgd",
            max_grad_norm=0.0,
            bf16=how == "bfloat16 autocast",
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if on else None,
        )
        trainer.train()
        assert moved(model)
        results.append(tuned(model))
    for term, delta in results[0].items():  # the order in which half-precision gradients are summed differs
        assert (delta - results[1][term]).abs().max() < 0.03 * delta.abs().max(), term


# torch.compile -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", ["bert-sequence", "vit-image"])
def test_torch_compile(name: str, bf16: bool, tmp_path: Path) -> None:
    """Traced forward and backward, without inductor's C++, which takes minutes to compile."""
    results = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = fresh(name)
        values = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = trainer_for(model, tmp_path / str(compiled), train=rows(8, name), save_steps=4, bf16=bf16, **values)
        trainer.train()
        results[compiled] = losses(trainer), tuned(model), saved(tmp_path / str(compiled) / "checkpoint-4")
    torch._dynamo.reset()
    (plain_losses, plain, _), (compiled_losses, deltas, on_disk) = results[False], results[True]
    assert compiled_losses == pytest.approx(plain_losses, abs=5e-3 if bf16 else 1e-5)
    assert same(on_disk, deltas)
    assert plain.keys() == deltas.keys()
    live = [key for key in deltas if ".key." not in key and "bitfit" in key]
    assert correlation({k: plain[k] for k in live}, {k: deltas[k] for k in live}) > (0.95 if bf16 else 0.99)
