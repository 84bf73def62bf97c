"""Bases whose weights are quantized, by the libraries themselves: bitsandbytes in 8 and 4 bit, torchao in int8.

The base is a small random BERT of sizes that all kernels take, and for one test of each kind the real MiniLM. What is
not quantized (biases, norms, embeddings) keeps its dtype, and the head is left out of the quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import quickstart
import torch
from architectures import randomize_
from peft import PeftModel, get_peft_model
from torch import nn
from trainer_tester import Tensors, losses, moved, same, trainer_for, tuned
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from tuner_tester import base_tensors, fill_, identical, same_tensors

from bitfit_hf import BaseModelMismatchError, BiasDelta, BitFitCallback, BitFitConfig, TaskBank, load_delta
from bitfit_hf.backends.quantized import dequantized
from bitfit_hf.storage.fingerprint import QUANTIZED, QUANTIZED_TOLERANCE, decode, differences

LIBRARIES = {"8-bit": "bitsandbytes", "4-bit": "bitsandbytes", "nested 4-bit": "bitsandbytes", "int8": "torchao"}
CASTING = [kind for kind, library in LIBRARIES.items() if library == "bitsandbytes"]
FOUR_BIT = ["4-bit", "nested 4-bit"]

# 4-bit scales belong to blocks of 64 weights: with 128 columns a weight has several in each row.
SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16}
BERT = {
    **SIZES,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {**SIZES, "hidden_size": 128, "intermediate_size": 192, "num_key_value_heads": 2}


def quantization(kind: str) -> Any:
    """The `quantization_config` that leaves out the head."""
    pytest.importorskip(LIBRARIES[kind], reason="an optional library, of the extra `integrations`")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "8-bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier", "lm_head"])
    if kind == "4-bit":
        return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["classifier", "lm_head"])
    if kind == "nested 4-bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["classifier", "lm_head"],
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["classifier", "lm_head"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in full precision."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    randomize_(BertForSequenceClassification(BertConfig(**BERT))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sibling(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint after twenty steps of full fine-tuning."""
    folder = tmp_path_factory.mktemp("sibling")
    model = load(checkpoint).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    for _ in range(20):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def load(
    folder: Path,
    kind: str | None = None,
    *,
    auto_class: Any = AutoModelForSequenceClassification,
    rearrange: bool = False,
    **options: Any,
) -> nn.Module:
    """The model in `folder`, quantized if `kind` says so.

    CPUs with AVX512-BF16 evaluate stock 4-bit layers with another kernel, which rounds more, than all other CPUs and
    than tuned layers. `rearrange=False` has them use the common one.
    """
    config = {} if kind is None else {"quantization_config": quantization(kind)}
    model = auto_class.from_pretrained(folder, **config, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and not rearrange:
            module.support_avx512bf16_for_cpu = False
    return model


def has_avx512() -> bool:
    """Whether bitsandbytes multiplies int8 values as integers on this CPU; it asks PyTorch in the same way."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def rows(count: int = 16) -> list[Tensors]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (count, 7), generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return [
        {"input_ids": ids[i], "attention_mask": torch.ones_like(ids[i]), "labels": labels[i]} for i in range(count)
    ]


@torch.no_grad()
def answer(model: nn.Module, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Hidden states and logits, perhaps under autocast."""
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.autocast("cpu", dtype) if dtype else nullcontext():
        output = model(input_ids=ids, output_hidden_states=True)
    return [*output.hidden_states, output.logits]


def effect(model: PeftModel) -> torch.Tensor:
    """What the adapter changes in the last hidden state."""
    with model.disable_adapter():
        base = answer(model)[-2]
    return (answer(model)[-2] - base).flatten().float()


def trained(model: nn.Module, folder: Path, **values: Any) -> tuple[PeftModel, list[float]]:
    """The model wrapped and trained for some steps with evaluations in between, and the loss of every step."""
    model = get_peft_model(model, BitFitConfig(task_type="SEQ_CLS"))
    trainer = trainer_for(
        model,
        folder,
        BitFitCallback(),
        train=rows(),
        **{
            "max_steps": 20,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-2,
            "eval_strategy": "steps",
            "eval_steps": 8,
            **values,
        },
    )
    trainer.train()
    return model.eval(), losses(trainer)


# Training, saving, loading -------------------------------------------------------------------------------------------


# Each kind is tried with float32, and with one of the others in turn; the slow tests are the rest.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=pytest.mark.slow if (number + other) % 2 else ())
        for number, kind in enumerate(LIBRARIES)
        for dtype, other in ((torch.float32, number), (torch.bfloat16, 0), (torch.float16, 1))
    ],
    ids=str,
)
def test_training_saving_and_loading(kind: str, dtype: torch.dtype, checkpoint: Path, tmp_path: Path) -> None:
    before = vectors(load(checkpoint, kind, dtype=dtype))
    assert len(before) == 2 * 6 + 5 * 2 + 1 + 1  # biases, LayerNorms, pooler and classifier
    model, curve = trained(load(checkpoint, kind, dtype=dtype), tmp_path / "run", save_steps=20)
    assert sum(curve[-3:]) < 0.75 * sum(curve[:3])
    assert moved(model)
    assert {tensor.dtype for tensor in tuned(model).values()} == {torch.float32}
    assert same_tensors(vectors(model), before)

    model.save_pretrained(tmp_path / "delta")
    assert sum(path.stat().st_size for path in (tmp_path / "delta").glob("*.safetensors")) < 30_000
    expected = answer(model)
    for folder in (tmp_path / "delta", tmp_path / "run" / "checkpoint-20"):
        again = PeftModel.from_pretrained(load(checkpoint, kind, dtype=dtype), folder).eval()
        assert same(tuned(again), tuned(model))
        assert identical(answer(again), expected)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_delta_moves_between_the_quantized_and_the_full_precision_base(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    bases: dict[str, Callable[[], nn.Module]] = {
        "quantized": lambda: load(checkpoint, kind),
        "full": lambda: load(checkpoint),
        "bfloat16": lambda: load(checkpoint, dtype=torch.bfloat16),
        "quantized bfloat16": lambda: load(checkpoint, kind, dtype=torch.bfloat16),
    }
    for here, make in bases.items():
        model = fill_(get_peft_model(make(), BitFitConfig(task_type="SEQ_CLS")).eval())
        model.save_pretrained(tmp_path / here)
        wanted = effect(model)
        for make_other in bases.values():
            other = PeftModel.from_pretrained(make_other(), tmp_path / here).eval()
            assert same(tuned(other), tuned(model))
            assert torch.cosine_similarity(effect(other), wanted, dim=0) > 0.8
    in_place = load_delta(load(checkpoint, kind), tmp_path / "full")
    wrapped = PeftModel.from_pretrained(load(checkpoint, kind), tmp_path / "full").eval()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(answer(in_place), answer(wrapped), strict=True))


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_fine_tuned_sibling_is_refused(kind: str, checkpoint: Path, sibling: Path, tmp_path: Path) -> None:
    get_peft_model(load(checkpoint, kind), BitFitConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "quantized")
    get_peft_model(load(checkpoint), BitFitConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "full")
    for delta, base in (
        ("quantized", load(sibling)),
        ("full", load(sibling, kind)),
        ("quantized", load(sibling, kind)),
    ):
        with pytest.raises(BaseModelMismatchError, match="bias differs"):
            PeftModel.from_pretrained(base, tmp_path / delta)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_the_real_model(kind: str, tmp_path: Path) -> None:
    """All-MiniLM-L6-v2 learns two sentences' labels, and its weights stay well inside the fingerprint's tolerance."""
    folder = quickstart.demo_model()
    options = {"num_labels": 2, "dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["a wonderful view", "an awful bed", "the soup was superb", "a dreadful plot", "lovely", "useless"]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    data = [{**{name: t[i] for name, t in encoded.items()}, "labels": torch.tensor(i % 2)} for i in range(len(texts))]

    torch.manual_seed(0)
    model = get_peft_model(load(folder, kind, **options), BitFitConfig(task_type="SEQ_CLS"))
    trainer = trainer_for(model, tmp_path, train=data, max_steps=12, per_device_train_batch_size=6, learning_rate=3e-3)
    trainer.train()
    curve = losses(trainer)
    assert curve[-1] < 0.6 * curve[0]
    model.eval().save_pretrained(tmp_path / "delta")
    full = PeftModel.from_pretrained(load(folder, **options), tmp_path / "delta").eval()
    assert same(tuned(full), tuned(model))
    prints = decode(model.peft_config["default"].base_fingerprint)
    exact = decode(get_peft_model(load(folder, **options), BitFitConfig()).peft_config["default"].base_fingerprint)
    assert prints.keys() == exact.keys()
    weights = [name for name, found in prints.items() if found.dtype == QUANTIZED]
    assert len(weights) == 6 * 6
    for name in weights:
        gap = max(abs(a - b) for a, b in zip(prints[name].sample, exact[name].sample, strict=True))
        assert gap < 0.7 * QUANTIZED_TOLERANCE * max(map(abs, exact[name].sample)), name
    assert torch.equal(full(**encoded).logits.argmax(-1), torch.tensor([0, 1] * 3))


def test_the_stock_model_is_refused_before_it_is_trained(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer_for(load(checkpoint, "8-bit"), tmp_path, train=rows())


# What bitsandbytes does to biases and weights ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_fresh_adapter_changes_no_bit_of_the_backbone(
    kind: str, dtype: torch.dtype, autocast: torch.dtype | None, checkpoint: Path
) -> None:
    """And bitsandbytes, which casts the biases that it reads in place, changes no bit of the stored ones.

    Bits are compared, so that equal NaN are equal. On a CPU without AVX-512, bitsandbytes multiplies int8 values by a
    float32 matmul; float16 autocast makes that one in float16, where sums above 65,504 are infinite. The hidden states
    of an 8-bit model then are NaN, tuned or not.
    """
    expected = answer(load(checkpoint, kind, dtype=dtype), autocast)
    broken_kernel = kind == "8-bit" and autocast == torch.float16 and not has_avx512()
    assert broken_kernel or all(tensor.isfinite().all() for tensor in expected)
    stock = load(checkpoint, kind, dtype=dtype)
    stored = vectors(stock)
    model = get_peft_model(stock, BitFitConfig(task_type="SEQ_CLS")).eval()
    assert identical(answer(model, autocast)[:-1], expected[:-1])
    logits = answer(model, autocast)[-1].float()  # the head is float32
    assert torch.allclose(logits, expected[-1].float(), atol=2e-2, equal_nan=broken_kernel)
    with model.disable_adapter():
        assert identical(answer(model, autocast), expected)
    assert same_tensors(vectors(model), stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LIBRARIES)
def test_merging_is_exact_for_biases(kind: str, dtype: torch.dtype, checkpoint: Path) -> None:
    stock = load(checkpoint, kind, dtype=dtype)
    stored = vectors(stock)
    model = fill_(get_peft_model(stock, BitFitConfig(task_type="SEQ_CLS")).eval())
    before = answer(model)
    with model.disable_adapter():
        base = answer(model)
    model.merge_adapter()
    assert identical(answer(model), before)
    with model.disable_adapter():
        assert identical(answer(model), base)
    deltas = {n.replace("bitfit_bias", "bias"): t for n, t in tuned(model).items() if "bitfit" in n}
    merged = vectors(model)
    assert len(deltas) == 2 * 8 + 2
    for name, delta in deltas.items():
        assert torch.equal(merged[name], (stored[name].float() + delta).to(dtype)), name
    model.unmerge_adapter()
    assert same_tensors(vectors(model), stored)
    assert identical(answer(model), before)
    unloaded = copy.deepcopy(model).unload()
    assert same_tensors(vectors(unloaded), stored)


@pytest.mark.parametrize("kind", CASTING)
def test_a_merged_model_is_a_quantized_checkpoint(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    model = fill_(get_peft_model(load(checkpoint, kind), BitFitConfig(task_type="SEQ_CLS")).eval())
    expected = answer(model)
    stock = model.merge_and_unload()
    assert not any("bitfit" in name for name, _ in stock.named_parameters())
    stock.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(answer(again), expected, strict=True))


@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CASTING)
def test_inputs_of_another_dtype_than_the_biases(kind: str, here: torch.dtype, checkpoint: Path) -> None:
    """A layer that was kept in another precision gives the next one such inputs."""
    other = torch.bfloat16 if here == torch.float32 else torch.float32
    path = "bert.encoder.layer.0.intermediate.dense"
    x = torch.randn(2, 5, BERT["hidden_size"], dtype=other)
    plain = load(checkpoint, kind, dtype=here).get_submodule(path)
    model = get_peft_model(load(checkpoint, kind, dtype=here), BitFitConfig(task_type="SEQ_CLS"))
    layer = model.get_base_model().get_submodule(path)
    for training in (False, True):
        with torch.no_grad():
            assert torch.equal(layer.train(training)(x), plain.train(training)(x))
        assert layer(x).dtype == other
        layer(x).sum().backward()
    gradient = layer.bitfit_bias["default"].grad
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full_like(gradient, 20.0))  # ten positions, two passes
    assert layer.base_layer._parameters["bias"].dtype == here


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_evaluating_a_four_bit_base_first(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16 it rearranges the weights: the base is still the base, and can be trained and saved."""
    get_peft_model(load(checkpoint, kind), BitFitConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "delta")
    used, fresh = load(checkpoint, kind, rearrange=True), load(checkpoint, kind)
    answer(used)
    path = "bert.encoder.layer.1.output.dense"
    scale = dequantized(fresh.get_submodule(path)).abs().max()
    gap = (dequantized(used.get_submodule(path)) - dequantized(fresh.get_submodule(path))).abs().max()
    assert gap < 2**-7 * scale  # the scales are rounded to bfloat16
    model = PeftModel.from_pretrained(used, tmp_path / "delta", is_trainable=True)
    assert not differences(model, model.peft_config["default"].base_fingerprint)
    reference = PeftModel.from_pretrained(fresh, tmp_path / "delta", is_trainable=True)
    gradients = []
    for each in (model, reference):
        batch = {name: torch.stack([row[name] for row in rows(4)]) for name in rows()[0]}
        each.train()(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 8 + 2 + 2
    for name, gradient in gradients[0].items():
        if ".key." not in name:  # zero but for rounding
            assert torch.allclose(gradient, gradients[1][name], atol=0.05 * gradient.abs().max().item()), name
    expected = answer(model.eval())
    model.state_dict()
    assert identical(answer(model), expected)


def vectors(model: nn.Module) -> Tensors:
    """The parameters that no library quantizes, by stock name."""
    return {
        n: t for n, t in base_tensors(model).items() if t.dim() == 1 and t.is_floating_point() and "weight." not in n
    }


# Decoders with added biases ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    randomize_(LlamaForCausalLM(LlamaConfig(**LLAMA))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LIBRARIES)
def test_added_biases(kind: str, dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    ids = torch.stack([row["input_ids"] for row in rows(4)])

    def make() -> nn.Module:
        return load(llama, kind, auto_class=AutoModelForCausalLM, dtype=dtype)

    def logits(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    model = get_peft_model(make(), BitFitConfig(task_type="CAUSAL_LM", add_missing_biases=True)).eval()
    assert torch.equal(logits(model), logits(make()))
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = trainer_for(model, tmp_path, train=data, max_steps=12, learning_rate=2e-2)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    model.eval().save_pretrained(tmp_path / "delta")
    expected = logits(model)
    again = PeftModel.from_pretrained(make(), tmp_path / "delta").eval()
    assert torch.equal(logits(again), expected)
    again.merge_adapter()
    assert torch.equal(logits(again), expected)
    again.unmerge_adapter()
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    assert merged.config.attention_bias
    assert merged.config.mlp_bias
    assert torch.equal(logits(merged), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", LIBRARIES)
def test_reading_the_weights_of_a_base_in_use_leaves_it_usable(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    BiasDelta.from_model(fill_(get_peft_model(load(checkpoint), BitFitConfig()))).save_pretrained(tmp_path)
    model = load(checkpoint, kind)
    before = answer(model)
    weights = dict(model.named_parameters())
    for module in model.modules():
        if hasattr(module, "weight") and (hasattr(module, "state") or hasattr(module, "quant_state")):
            dequantized(module)
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert identical(answer(model), before)
    load_delta(model, tmp_path)  # compares fingerprints
    assert not identical(answer(model), before)


@torch.no_grad()
# Every other one is slow: all pairs of a kind, of a fresh or used base and of its arrangement are tried without these.
@pytest.mark.parametrize(
    ("kind", "used", "rearrange"),
    [
        pytest.param(kind, used, rearrange, marks=pytest.mark.slow if (number + used + rearrange) % 2 else ())
        for number, kind in enumerate(LIBRARIES)
        for used in (False, True)
        for rearrange in (False, True)
    ],
)
def test_a_bank_on_a_quantized_base(kind: str, used: bool, rearrange: bool, checkpoint: Path) -> None:
    tuned_models = (fill_(get_peft_model(load(checkpoint, kind), BitFitConfig()), seed=seed) for seed in range(2))
    deltas = [BiasDelta.from_model(model) for model in tuned_models]
    ids = torch.stack([row["input_ids"] for row in rows(5)])
    base = load(checkpoint, kind, rearrange=rearrange)
    before = base(ids).logits if used else None
    bank = TaskBank(base)
    for number, delta in enumerate(deltas):
        bank.add_task(str(number), delta)
    tasks = ["0", "1", None, "1", "0"]
    mixed = bank(input_ids=ids, tasks=tasks).logits
    # 8-bit and bf16 kernels round more where a row stands in a larger batch.
    tolerance = 0.1 if kind in ("8-bit", "nested 4-bit") or rearrange else 1e-5
    plain = base(ids).logits  # works beside the bank
    assert before is None or torch.allclose(plain, before, atol=tolerance)
    for example, task in enumerate(tasks):
        alone = load(checkpoint, kind, rearrange=rearrange)
        if task is not None:
            deltas[int(task)].apply_(alone)
        expected = alone(ids[example : example + 1]).logits[0]
        assert torch.allclose(mixed[example], expected, atol=tolerance)
        assert task is None or (expected - plain[example]).abs().max() > 1
    # Nothing of the base is held twice.
    mine = {memory(value) for module in base.modules() for value in held(module)}
    assert all(memory(value) in mine for module in bank._base.model.modules() for value in held(module))


def held(module: nn.Module) -> list[torch.Tensor]:
    """The tensors of a layer, and those of its quantization."""
    states = [getattr(module, name, None) for name in ("state", "quant_state")]
    kept = [getattr(state, name, None) for state in states for name in ("CB", "SCB", "absmax", "code")]
    return [value for value in (*module._parameters.values(), *kept) if isinstance(value, torch.Tensor)]


def memory(value: torch.Tensor) -> tuple[type, int]:
    """Where a tensor's values lie; of those that are made of several tensors, which it is."""
    plain = type(value.data) is torch.Tensor
    return type(value), value.data_ptr() if plain else id(value)
