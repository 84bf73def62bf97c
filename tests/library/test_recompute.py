"""Activations that are computed again: the same outputs and gradients, and fewer bytes kept for the backward pass."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from benchmarks.kept import kept_bytes
from peft import get_peft_model
from torch import nn
from trainer_tester import arguments
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)
from tuner_tester import same_tensors, state

from bitfit_hf import BitFitCallback, BitFitConfig, recompute_activations
from bitfit_hf.errors import RecomputationError, UnsupportedLayerError
from bitfit_hf.recompute import recomputed_regions

BATCH, LENGTH, HIDDEN, WIDE, LAYERS = 4, 32, 64, 256, 2
UNIT = BATCH * LENGTH * HIDDEN * 4  # bytes of one tensor of hidden states
IDS = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 90 + 5
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": WIDE,
}


def _classes() -> dict[str, torch.Tensor]:
    ids = IDS.clone()
    ids[:, -1] = 2  # BART wants an end of sequence
    return {"input_ids": ids, "labels": torch.arange(BATCH) % 2}


def _language() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "labels": IDS}


def _images() -> dict[str, torch.Tensor]:
    pixels = torch.randn(BATCH, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.arange(BATCH) % 2}


@dataclass
class Case:
    """A model whose MLPs are found.

    Args:
        factory: Makes it, with dropout.
        batch: What it is trained on.
        regions (`int`): How many modules compute again.
        saved (`float`): Least fall of the kept bytes, in tensors of hidden states.
        config: For [`BitFitConfig`].
    """

    factory: Any
    batch: Any
    regions: int
    saved: float
    config: dict[str, Any]


# A layer keeps the input of its activation, four tensors of hidden states, and what an activation of several
# operations (GPT-2, ALBERT) or a gate (Llama) keeps beside it.
CASES = {
    "bert": Case(lambda: BertForSequenceClassification(BertConfig(**SIZES, vocab_size=100)), _classes, 2, 8, {}),
    "distilbert": Case(
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(dim=HIDDEN, hidden_dim=WIDE, n_layers=LAYERS, n_heads=4, vocab_size=100)
        ),
        *(_classes, 2, 8, {}),
    ),
    "gpt2": Case(
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=4, vocab_size=100)),
        *(_language, 2, 24, {}),
    ),
    "vit": Case(
        lambda: ViTForImageClassification(
            ViTConfig(**SIZES, image_size=40, patch_size=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        ),
        *(_images, 2, 6, {}),  # an image has 26 tokens
    ),
    "llama": Case(
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=100, attention_dropout=0.1)),
        *(_language, 2, 24, {"add_missing_biases": True}),
    ),
    "t5": Case(
        lambda: T5ForConditionalGeneration(
            T5Config(
                d_model=HIDDEN,
                d_ff=WIDE,
                num_layers=LAYERS,
                num_heads=4,
                d_kv=16,
                vocab_size=100,
                decoder_start_token_id=0,
            )
        ),
        *(_language, 4, 16, {"add_missing_biases": True}),
    ),
    "bart": Case(
        lambda: BartForSequenceClassification(
            BartConfig(
                d_model=HIDDEN,
                encoder_layers=LAYERS,
                decoder_layers=LAYERS,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=WIDE,
                decoder_ffn_dim=WIDE,
                activation_dropout=0.1,
                vocab_size=100,
                num_labels=2,
                eos_token_id=2,
            )
        ),
        *(_classes, 4, 16, {}),
    ),
    "albert": Case(  # one layer's weights, used by two
        lambda: AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=HIDDEN, vocab_size=100)),
        *(_classes, 1, 8, {}),
    ),
}


def stock(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return CASES[name].factory().train()


def tuned(name: str) -> Any:
    """A tuned model in training mode, its deltas no longer zero."""
    model = get_peft_model(stock(name), BitFitConfig(**CASES[name].config)).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one step, with the same dropout masks every time."""
    torch.manual_seed(3)
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    return outputs.logits.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    assert wanted
    for name, value in wanted.items():
        assert torch.isfinite(value).all(), name
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("name", CASES)
def test_same_result_with_fewer_bytes(name: str) -> None:
    case, model = CASES[name], tuned(name)
    batch = case.batch()
    before = kept_bytes(model, batch)
    logits, wanted = step(model, batch)
    other, _ = step(model, batch)
    assert torch.equal(logits, other)  # the seed fixes the dropout

    assert recompute_activations(model) is model
    assert len(recomputed_regions(model)) == case.regions
    again, found = step(model, batch)
    assert torch.equal(again, logits)
    assert_equal(found, wanted)
    assert before - kept_bytes(model, batch) >= case.saved * UNIT

    recompute_activations(model, enabled=False)
    assert recomputed_regions(model) == []
    assert kept_bytes(model, batch) == before


def test_the_dropout_of_these_cases_matters() -> None:
    for name, case in CASES.items():
        model, batch = tuned(name), case.batch()
        logits, _ = step(model, batch)
        assert not torch.equal(model(**batch).logits, logits), name


def test_norms_input_is_what_is_kept() -> None:
    # Keeping the input of each MLP, the norm's output, would save one tensor of hidden states less in each layer.
    model, batch = tuned("bert"), _classes()
    before = kept_bytes(model, batch)
    with_norms = before - kept_bytes(recompute_activations(model), batch)
    for module in model.modules():
        module._forward_hooks.clear()
    without = before - kept_bytes(model, batch)
    assert with_norms - without == LAYERS * UNIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model, batch = tuned("bert"), _classes()
    results = []
    for enabled in (False, True):
        recompute_activations(model, enabled=enabled)
        torch.manual_seed(3)
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            outputs = model(**batch)
        outputs.loss.backward()
        results.append((outputs.logits.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert_equal(results[1][1], results[0][1])


def test_half_precision_base() -> None:
    model, batch = tuned("bert").to(torch.bfloat16), _classes()
    logits, wanted = step(model, batch)
    again, found = step(recompute_activations(model), batch)
    assert torch.equal(again, logits)
    assert_equal(found, wanted)


def test_biases_unfrozen_by_hand() -> None:
    model, batch = stock("bert"), _classes()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    before = kept_bytes(model, batch)
    logits, wanted = step(model, batch)
    again, found = step(recompute_activations(model), batch)
    assert torch.equal(again, logits)
    assert_equal(found, wanted)
    assert before - kept_bytes(model, batch) >= 8 * UNIT


def test_full_fine_tuning_stays_right() -> None:
    model, batch = stock("llama"), _language()
    logits, wanted = step(model, batch)
    again, found = step(recompute_activations(model), batch)
    assert torch.equal(again, logits)
    assert_equal(found, wanted)


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_leaves_no_trace(name: str) -> None:
    model = tuned(name)
    before, tensors = state(model), model.state_dict()
    recompute_activations(recompute_activations(model))
    assert same_tensors(model.state_dict(), tensors)
    assert len(recomputed_regions(model)) == CASES[name].regions
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert max(hooks) == 1  # not twice
    recompute_activations(model, enabled=False)
    assert state(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_compute_with_their_own_tensors() -> None:
    model, batch = recompute_activations(tuned("bert")), _classes()
    logits, wanted = step(model, batch)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert recomputed_regions(copied) == recomputed_regions(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        again, found = step(copied, batch)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(1)
        assert torch.equal(again, logits)
        assert_equal(found, wanted)


def test_tuner_injected_afterwards() -> None:
    batch = _classes()
    _, wanted = step(get_peft_model(stock("bert"), BitFitConfig()), batch)
    base = recompute_activations(stock("bert"))
    _, found = step(get_peft_model(base, BitFitConfig()), batch)
    assert recomputed_regions(base)
    assert_equal(found, wanted)


def test_unloading_and_merging() -> None:
    model = recompute_activations(tuned("bert")).eval()
    wanted = model(**_classes()).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**_classes()).logits, wanted, atol=1e-6, rtol=1e-5)
    recompute_activations(merged, enabled=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())


# --- between a forward pass and its backward pass ---


def test_adapters_switched_before_the_backward_pass() -> None:
    results = []
    for enabled in (False, True):
        model, batch = tuned("bert"), _classes()
        model.add_adapter("other", BitFitConfig())
        recompute_activations(model, enabled=enabled)
        torch.manual_seed(3)
        first = model(**batch).loss
        with model.disable_adapter():
            model(**batch)
        model.set_adapter("other")
        second = model(**batch).loss
        model.set_adapter("default")
        model.base_model.set_requires_grad("other")  # frozen as it was switched off, which is not what this is about
        (first + second).backward()
        results.append(gradients(model))
    assert any(".other" in name for name in results[0])
    assert_equal(results[1], results[0])


def test_disabled_adapters() -> None:
    model, batch = recompute_activations(tuned("bert")), _classes()
    with model.disable_adapter(), torch.no_grad():
        model.eval()
        disabled = model(**batch).logits
    torch.testing.assert_close(disabled, stock("bert").eval()(**batch).logits.detach(), atol=1e-6, rtol=1e-5)


def test_update_before_the_backward_pass_is_an_error() -> None:
    model, batch = recompute_activations(tuned("bert")), _classes()
    loss = model(**batch).loss
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bitfit_" in name:
                parameter.add_(1)
    with pytest.raises(RecomputationError, match="between a forward pass and its backward pass"):
        loss.backward()


def test_merging_before_the_backward_pass_is_an_error() -> None:
    model, batch = recompute_activations(tuned("bert")), _classes()
    loss = model(**batch).loss
    model.merge_adapter()
    with pytest.raises(RecomputationError, match="merged"):
        loss.backward()


def test_two_backward_passes_through_one_graph() -> None:
    model, batch = recompute_activations(tuned("bert")), _classes()
    torch.manual_seed(3)
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_equal(gradients(model), {name: 2 * gradient for name, gradient in once.items()})


def test_output_changed_in_place_is_not_taken_for_the_norms() -> None:
    model, batch = recompute_activations(tuned("bert")), _classes()
    norm = model.base_model.model.bert.encoder.layer[0].attention.output.LayerNorm
    norm.register_forward_hook(lambda module, args, output: output.mul_(2))
    logits, found = step(model, batch)
    recompute_activations(model, enabled=False)
    plain, wanted = step(model, batch)
    assert torch.equal(logits, plain)
    assert_equal(found, wanted)


@torch.no_grad()
def test_mixed_batches_are_left_alone() -> None:
    model, batch = tuned("bert").eval(), _classes()
    model.add_adapter("other", BitFitConfig())
    names = ["default", "other", "__base__", "default"]
    wanted = model(**batch, adapter_names=names).logits
    recompute_activations(model)
    with torch.enable_grad():
        found = model(**batch, adapter_names=names).logits
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_compiled_models_take_the_ordinary_path() -> None:
    model, batch = recompute_activations(tuned("bert").eval()), _classes()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    compiled(**batch).loss.backward()
    found = gradients(model)
    recompute_activations(model, enabled=False)
    model.zero_grad()
    model(**batch).loss.backward()
    assert_equal(found, gradients(model), tolerance=1e-5)


# --- where it does not apply ---


def test_no_mlp_is_an_error() -> None:
    arch = ARCHITECTURES["convnet"]
    with pytest.raises(UnsupportedLayerError, match="found no MLP in ConvNet"):
        recompute_activations(arch.build())


def test_gradient_checkpointing_makes_it_pointless(caplog: pytest.LogCaptureFixture) -> None:
    model = tuned("bert")
    model.base_model.model.gradient_checkpointing_enable()
    with caplog.at_level(logging.WARNING, logger="bitfit_hf"):
        recompute_activations(model)
    assert "was left out" in caplog.text
    assert recomputed_regions(model) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_enabled_later_stays_right(reentrant: bool) -> None:
    results = []
    for enabled in (False, True):
        model, batch = tuned("bert"), _classes()
        if enabled:
            recompute_activations(model)
            base = model.base_model.model
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        results.append(step(model, batch))
    assert torch.equal(results[0][0], results[1][0])
    assert_equal(results[1][1], results[0][1])


# --- with a Trainer ---


def test_trainer_run_equals_the_ordinary_one(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, seen = [], []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=100))
        callback = BitFitCallback(BitFitConfig(), recompute_activations=enabled)
        monkeypatch.setattr(
            callback, "on_step_end", lambda *a, model=None, **k: seen.append(len(recomputed_regions(model)))
        )
        data = [{"input_ids": IDS[i % BATCH], "labels": i % 2} for i in range(16)]
        options = arguments(tmp_path / str(enabled), max_steps=4, learning_rate=1e-3)
        Trainer(model, options, train_dataset=data, callbacks=[callback]).train()
        assert recomputed_regions(model) == []
        deltas.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert seen == [0] * 4 + [LAYERS] * 4
    assert_equal(deltas[1], deltas[0])
    assert any(tensor.abs().max() > 1e-4 for name, tensor in deltas[0].items() if "bitfit_" in name)
