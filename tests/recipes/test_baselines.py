"""The comparison systems of the paper: what each trains, saves and loads, with a stock Trainer on tiny models."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from launching import LAUNCHERS, launch_on_cpu
from peft import PeftModel
from reproduction.baselines import METHODS as ALL_METHODS
from reproduction.baselines import Method, TrainableCount, make_method
from reproduction.baselines.adapter import Bottleneck
from reproduction.baselines.base import body_parameters, head_parameters, head_tensors
from reproduction.baselines.diff_pruning import (
    LOWER,
    UPPER,
    DiffPruning,
    DiffPruningCallback,
    GatedDifference,
    _SampledGates,
    gates,
)
from reproduction.baselines.random_subset import RandRowCol
from reproduction.baselines.sparse import SparseValues, parametrizations
from safetensors.torch import load_file
from torch import nn
from trainer_tester import arguments, files, fresh, losses, rows, same, saved, stock_trainer
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, TrainerCallback

from bitfit_hf.errors import UnknownTermError
from bitfit_hf.terms import find_biases, head_modules, select_biases
from bitfit_hf.terms.structure import stock_root

# BitFit by default is BitFit with another argument of its callback: `test_rates` is about that.
METHODS = [name for name in ALL_METHODS if name != "bitfit_default"]
SUBSETS = ["bitfit:query+intermediate", "bitfit:intermediate", "bitfit:query"]
NAMES = [*METHODS, *SUBSETS]
ARCHS = ["bert-sequence", "distilbert-sequence"]
OPTIONS: dict[str, dict[str, Any]] = {"adapter": {"bottleneck": 4}, "diff_pruning": {"sparsity": 0.03}}
SPARSE_FILE = "sparse.safetensors"
STEPS = 24

_folders = TemporaryDirectory(prefix="bitfit-baselines-")


@dataclass
class Run:
    """A finished run, what it began with, and what a fresh base became by loading what it saved."""

    arch: str
    method: Method
    model: nn.Module
    base: PreTrainedModel
    count: TrainableCount
    losses: tuple[float, float]
    folder: Path
    bytes: int
    loaded: nn.Module


def method_for(name: str, seed: int = 0) -> Method:
    return make_method(name, seed=seed, **OPTIONS.get(name, {}))


@torch.no_grad()
def outputs(model: nn.Module, arch: str) -> Any:
    examples = rows(16, arch)
    return model.eval()(**{name: torch.stack([example[name] for example in examples]) for name in examples[0]})


def trainer_for(method: Method, model: nn.Module, arch: str, folder: str | Path, *more: Any, **values: Any) -> Any:
    """An unmodified Trainer, made as the interface says. Decay is on, so that it would show where it must not be."""
    args = arguments(folder, **{"max_steps": STEPS, "per_device_train_batch_size": 8, "weight_decay": 0.1, **values})
    callbacks, kwargs = [*method.callbacks(), *more], method.trainer_kwargs(model, args)
    return stock_trainer(model, args, train=rows(16, arch), callbacks=callbacks, **kwargs)


@cache
def run(name: str, arch: str) -> Run:
    """Trains once for all tests, which only look at it."""
    folder = Path(_folders.name) / arch / name.replace(":", "-")
    method = method_for(name)
    model = method.prepare(fresh(arch))
    count = method.trainable(model)
    before = outputs(model, arch).loss.item()
    trainer_for(method, model, arch, folder / "trainer").train()
    after = outputs(model, arch).loss.item()
    size = method.save(model, folder / "saved")
    loaded = method_for(name).load(fresh(arch), folder / "saved")
    return Run(arch, method, model, fresh(arch), count, (before, after), folder / "saved", size, loaded)


def stock_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a loaded model by stock name, without those that its method has added."""
    names = {
        name: name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        for name in stock_root(model).state_dict()
        if ".original_module." not in name
    }
    return {stock: stock_root(model).state_dict()[name] for name, stock in names.items()}


def moved(run: Run) -> dict[str, torch.Tensor]:
    """Where the loaded model differs from the base, scalar by scalar, by name of the tensor."""
    base, loaded = run.base.state_dict(), stock_tensors(run.loaded)
    assert base.keys() <= loaded.keys()
    different = {name: base[name] != loaded[name] for name in base}
    return {name: where for name, where in different.items() if where.any()}


def moved_in_body(run: Run) -> dict[str, torch.Tensor]:
    head = head_tensors(run.base)
    return {name: where for name, where in moved(run).items() if name not in head}


def indices_in(folder: Path) -> dict[str, torch.Tensor]:
    """The flat indices in a sparse file, by name of the parameter."""
    saved = load_file(folder / SPARSE_FILE)
    return {name.removeprefix("indices."): t for name, t in saved.items() if name.startswith("indices.")}


def check_moved_exactly(run: Run, chosen: dict[str, torch.Tensor]) -> None:
    """Asserts that the scalars outside the head that differ from the base are those of flat indices `chosen`."""
    found = {name: where.flatten().nonzero().squeeze(1) for name, where in moved_in_body(run).items()}
    assert found.keys() == chosen.keys()
    for name, indices in chosen.items():
        assert torch.equal(found[name], indices.sort().values.long()), name


# --- every method ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(name, arch) for arch in ARCHS for name in NAMES], ids=lambda pair: "-".join(pair))
def one(request: pytest.FixtureRequest) -> Run:
    return run(*request.param)


def test_learns(one: Run) -> None:
    before, after = one.losses
    assert after < before - 0.05


def test_trains_the_whole_head(one: Run) -> None:
    head = head_tensors(one.base)
    assert len(head) == {"bert-sequence": 2, "distilbert-sequence": 4}[one.arch]
    assert head.keys() <= moved(one).keys()


def test_comes_back_with_equal_outputs(one: Run) -> None:
    trained, loaded = outputs(one.model, one.arch), outputs(one.loaded, one.arch)
    assert (trained.logits - outputs(one.base, one.arch).logits).abs().max() > 1e-2
    assert (trained.logits - loaded.logits).abs().max() <= 2e-6


def test_says_what_it_trains_and_costs(one: Run) -> None:
    head = sum(parameter.numel() for parameter in head_parameters(one.base).values())
    everything = sum(parameter.numel() for parameter in one.base.parameters())
    assert (one.count.head, one.count.base) == (head, everything - head)
    assert one.count.total == one.count.body + head
    assert one.count.body_percent == pytest.approx(100 * one.count.body / one.count.base)
    assert one.method.trainable(one.model) == one.count
    sizes = files(one.folder)
    assert one.bytes == sum(size for name, size in sizes.items() if name != "README.md")
    # Four bytes for each value, as many for its index where it is sparse, and names, shapes, configuration, which says
    # for each tensor where it belongs and what its base was.
    assert 4 * one.count.total < one.bytes < 4 * one.count.total + 4 * one.count.body + 20_000
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in sizes)


def test_starts_as_the_base() -> None:
    exact = [name for name in NAMES if name != "adapter"]
    for arch in ARCHS:
        expected = outputs(fresh(arch), arch).logits
        for name in exact:
            assert torch.equal(outputs(method_for(name).prepare(fresh(arch)), arch).logits, expected), name


@pytest.mark.parametrize("name", NAMES)
def test_draws_from_its_own_seed_and_leaves_the_process_its_own(name: str) -> None:
    def prepared(seed: int, process_seed: int) -> dict[str, torch.Tensor]:
        base = fresh()
        torch.manual_seed(process_seed)
        before = torch.get_rng_state()
        model = method_for(name, seed).prepare(base)
        assert torch.equal(torch.get_rng_state(), before)
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}

    assert same(prepared(3, 0), prepared(3, 1))
    draws = name in ("rand_uniform", "rand_row_col", "adapter", "lora")
    assert same(prepared(3, 0), prepared(4, 0)) == (not draws)


@pytest.mark.parametrize("name", METHODS)
def test_resumes_bit_identically(name: str, tmp_path: Path) -> None:
    results = []
    for step in (None, 4, 8):  # diff pruning projects at step 6
        method = method_for(name)
        model = method.prepare(fresh(dropout=0.1))
        trainer = trainer_for(method, model, "bert-sequence", tmp_path / "run", max_steps=12, save_steps=4)
        trainer.train(resume_from_checkpoint=None if step is None else str(tmp_path / "run" / f"checkpoint-{step}"))
        folder = tmp_path / str(step)
        method.save(model, folder)
        (file,) = (name for name in files(folder) if name.endswith(".safetensors"))
        results.append(saved(folder, file))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("name", METHODS)
def test_mixed_precision(name: str, tmp_path: Path) -> None:
    method = method_for(name)
    model = method.prepare(fresh())
    trainer = trainer_for(method, model, "bert-sequence", tmp_path / "run", bf16=True)
    trainer.train()
    history = losses(trainer)
    assert sum(history[-4:]) < sum(history[:4]) - 0.1
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    method.save(model, tmp_path / "saved")
    loaded = method_for(name).load(fresh(), tmp_path / "saved")
    model.__dict__.pop("forward")  # in which accelerate has put the autocast
    found, expected = outputs(loaded, "bert-sequence").logits, outputs(model, "bert-sequence").logits
    assert (found - expected).abs().max() <= 2e-6


# Heads of two layers, fused projections, biases of their own, layers that share their parameters, Conv1D, an image
# model, an encoder-decoder, a language model with tied embeddings.
ZOO = ["roberta-sequence", "electra-sequence", "albert-sequence", "deberta-sequence", "gpt2-sequence", "vit-image"]
ZOO += ["bart-sequence", "gpt2-causal_lm", "bert-token", "bert-question"]


@pytest.mark.parametrize("arch", ZOO)
def test_other_architectures(arch: str, tmp_path: Path) -> None:
    base = fresh(arch)
    inputs = {**ARCHITECTURES[arch].inputs(4), **ARCHITECTURES[arch].labels(4)}
    before = base(**inputs).loss
    seen = 0
    for name in METHODS:
        if name == "frozen" and arch == "gpt2-causal_lm":
            continue
        method = method_for(name)
        model = method.prepare(fresh(arch))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()(**inputs).loss.backward()
        optimizer.step()
        for callback in method.callbacks():
            if isinstance(callback, DiffPruningCallback):
                callback.on_train_end(SimpleNamespace(), SimpleNamespace(), SimpleNamespace(), model=model)
        method.save(model, tmp_path / name)
        loaded = method_for(name).load(fresh(arch), tmp_path / name)
        with torch.no_grad():
            after = model.eval()(**inputs).loss
            assert (loaded.eval()(**inputs).loss - after).abs() <= 2e-6, name
        assert after != before, name
        seen += 1
    assert seen >= len(METHODS) - 1


# --- full, frozen, bitfit, lora --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_full_moves_every_parameter(arch: str) -> None:
    one = run("full", arch)
    assert moved(one).keys() == dict(one.base.named_parameters()).keys()
    assert one.count.body == one.count.base


@pytest.mark.parametrize("arch", ARCHS)
def test_frozen_moves_the_head_only(arch: str) -> None:
    one = run("frozen", arch)
    assert not moved_in_body(one)
    assert one.count.body == 0
    assert load_file(one.folder / "head.safetensors").keys() == head_tensors(one.base).keys()


def test_frozen_without_a_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no new task head"):
        make_method("frozen").prepare(fresh("gpt2-causal_lm"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("name", "terms"),
    [("bitfit", "all"), *zip(SUBSETS, (["query", "intermediate"], "intermediate", "query"))],
)
def test_bitfit_moves_its_biases_only(name: str, terms: Any, arch: str) -> None:
    one = run(name, arch)
    biases = select_biases(one.base, bias_terms=terms)
    assert moved_in_body(one).keys() == {bias.name for bias in biases}
    assert one.count.body == sum(bias.num_parameters for bias in biases)


def test_lora_moves_no_weight_of_the_base() -> None:
    for arch in ARCHS:
        one = run("lora", arch)
        assert not moved_in_body(one)
        modules = {bias.module for bias in select_biases(one.base, bias_terms=["query", "value"])}
        assert isinstance(one.model, PeftModel)
        tuned = {name.partition(".lora_")[0] for name, _ in one.model.named_parameters() if ".lora_" in name}
        assert {name.removeprefix("base_model.model.") for name in tuned} == modules
        assert one.count.body == len(modules) * 8 * (32 + 32)


# --- rand_uniform, rand_row_col --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["rand_uniform", "rand_row_col"])
def test_rand_moves_exactly_what_was_drawn(name: str, arch: str) -> None:
    one = run(name, arch)
    drawn = indices_in(one.folder)
    assert sum(map(len, drawn.values())) == one.count.body == run("bitfit", arch).count.body
    assert {indices.dtype for indices in drawn.values()} == {torch.int32}
    check_moved_exactly(one, drawn)
    # In the trained model itself, as it computes: everything but the drawn scalars has the base's bits.
    for path, tensor, chosen in parametrizations(one.model, SparseValues):
        module, attribute = path.rpartition(".")[::2]
        live = getattr(one.model.get_submodule(module), attribute).detach()
        rest = torch.ones(live.numel(), dtype=torch.bool)
        rest[chosen.indices] = False
        assert torch.equal(live.flatten()[rest], one.base.get_parameter(path).flatten()[rest])
        assert torch.equal(tensor, one.base.get_parameter(path))


@pytest.mark.parametrize("name", ["rand_uniform", "rand_row_col"])
def test_rand_gives_the_optimizer_nothing_else(name: str, tmp_path: Path) -> None:
    method = method_for(name)
    model = method.prepare(fresh())
    trainer = trainer_for(method, model, "bert-sequence", tmp_path, max_steps=1)
    trainer.train()
    count = method.trainable(model)
    assert sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]) == count.total


def test_rand_uniform_draws_evenly() -> None:
    model = fresh()
    body = body_parameters(model)
    counts = dict.fromkeys(body, 0)
    everything = sum(parameter.numel() for parameter in body.values())
    for seed in range(20):
        for name, _, chosen in parametrizations(make_method("rand_uniform", seed=seed).prepare(fresh()), SparseValues):
            assert len(chosen.indices.unique()) == len(chosen.indices)
            counts[name] += len(chosen.indices)
    total = sum(counts.values())
    assert total == 20 * sum(bias.num_parameters for bias in find_biases(model))
    for name, parameter in body.items():
        expected = total * parameter.numel() / everything
        assert abs(counts[name] - expected) < 5 * math.sqrt(expected) + 1, name


def draw(model: PreTrainedModel, budget: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return RandRowCol()._draw(model, budget, np.random.default_rng(seed))


def test_rand_row_col_draws_whole_rows_or_columns() -> None:
    kinds = set()
    # The second budget takes several rounds.
    cases = [
        (arch, budget, seed)
        for arch in ("bert-sequence", "gpt2-sequence")
        for budget in (592, 6000)
        for seed in (0, 1)
    ]
    for arch, budget, seed in cases:
        model = fresh(arch)
        for name, at in draw(model, budget, seed).items():
            weight = model.get_parameter(name)
            mask = torch.zeros(weight.numel(), dtype=torch.bool)
            mask[at] = True
            assert int(mask.sum()) == len(at), "drawn twice"
            if weight.dim() == 1:
                assert mask.all()
                continue
            mask = mask.view(weight.shape)
            rows, columns = mask.all(1), mask.all(0)
            assert len(at) == int(rows.sum()) * mask.shape[1] + int(columns.sum()) * mask.shape[0]
            assert bool(rows.any()) != bool(columns.any())
            kinds.add((arch, "rows" if rows.any() else "columns", int((rows if rows.any() else columns).sum()) > 1))
    assert len(kinds) == 8


def wide_bert() -> PreTrainedModel:
    """With four rows of the first projection of the MLP in the place of its bias, as in BERT-base."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    nn.init.normal_(model.bert.pooler.dense.bias, std=0.02)  # a trained pooler's is not zero
    return model


def bert_base() -> PreTrainedModel:
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig())


@pytest.mark.parametrize(
    ("make", "count"), [(bert_base, 102_912), (wide_bert, 384), (lambda: fresh("gpt2-sequence"), 560)]
)
def test_rand_row_col_gives_each_bias_as_many_weights(make: Callable[[], PreTrainedModel], count: int) -> None:
    model = make()
    of_biases = {bias.module: 0 for bias in find_biases(model)}
    for bias in find_biases(model):  # a fused projection has several
        of_biases[bias.module] += bias.num_parameters
    assert sum(of_biases.values()) == count
    four_rows = 0
    for seed in range(4):
        drawn = draw(model, count, seed)
        assert {name.removesuffix(".weight"): len(at) for name, at in drawn.items()} == of_biases
        rows = drawn.get("bert.encoder.layer.0.intermediate.dense.weight")
        if rows is not None:
            four_rows += len((rows // model.config.hidden_size).unique()) == 4
    assert four_rows in ((1, 2, 3) if model.config.model_type == "bert" else (0,))


@pytest.mark.parametrize("budget", [7, 40, 300, 592, 1000, 3000])
def test_rand_of_another_budget(budget: int) -> None:
    for name in ("rand_uniform", "rand_row_col"):
        method = make_method(name, budget=budget)
        if name == "rand_row_col" and budget == 7:
            with pytest.raises(ValueError, match="budget of 7 parameters"):
                method.prepare(fresh())
            continue
        body = method.trainable(method.prepare(fresh())).body
        assert body == budget if name == "rand_uniform" else budget - 32 < body <= budget


def test_rand_budgets_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="budget=0"):
        make_method("rand_uniform", budget=0)
    with pytest.raises(ValueError, match="more than the 17712 parameters"):
        make_method("rand_uniform", budget=10**6).prepare(fresh())
    with pytest.raises(ValueError, match=r"no biases.*make_method\('rand_row_col', budget="):
        make_method("rand_row_col").prepare(fresh("llama-sequence"))
    assert make_method("rand_uniform", budget=5).prepare(fresh("llama-sequence")) is not None


# --- diff_pruning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_diff_pruning_reaches_its_sparsity_exactly(arch: str) -> None:
    one = run("diff_pruning", arch)
    kept = round(0.03 * one.count.base)
    assert one.count.body == kept
    assert sum(int(gate.mask.sum()) for _, _, gate in gates(one.model)) == kept
    indices = indices_in(one.folder)
    assert sum(map(len, indices.values())) == kept
    check_moved_exactly(one, indices)
    assert len({name.rpartition(".")[0] for name in indices}) > 5  # from the whole body


class Watch(TrainerCallback):
    """Writes down, at every step, how many values differ from the base in the model as evaluations see it."""

    def __init__(self, look: Callable[[nn.Module], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_epoch_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        model.eval()
        self.seen.append(self.look(model))
        model.train()


def different(model: nn.Module) -> int:
    """How many scalars of the body differ from the base's, as the model in its present mode computes with them."""
    base = fresh()
    count = 0
    for name, _, _ in gates(model):
        path, _, attribute = name.rpartition(".")
        count += int((getattr(model.get_submodule(path), attribute) != base.get_parameter(name)).sum())
    return count


def test_diff_pruning_has_two_phases_and_is_sparse_in_every_evaluation(tmp_path: Path) -> None:
    method = make_method("diff_pruning", sparsity=0.03, gated_share=0.6)
    model = method.prepare(fresh())
    phase = Watch(lambda model: ({gate.gated for _, _, gate in gates(model)}, different(model)))
    trainer = trainer_for(method, model, "bert-sequence", tmp_path, phase, max_steps=20)
    trainer.train()
    kept = round(0.03 * 17712)
    # Ten epochs of two steps; the projection is at the start of step 13.
    assert phase.seen == [({True}, kept)] * 6 + [({False}, kept)] * 4
    masks = {name: gate.mask.clone() for name, _, gate in gates(model)}
    assert sum(int(mask.sum()) for mask in masks.values()) == kept
    assert not any(gate.alpha.requires_grad for _, _, gate in gates(model))


def test_diff_pruning_saved_before_the_projection_is_what_projection_would_keep(tmp_path: Path) -> None:
    method = method_for("diff_pruning")
    model = method.prepare(fresh())
    trainer = trainer_for(method, model, "bert-sequence", tmp_path, max_steps=4)
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if not isinstance(callback, DiffPruningCallback)
    ]
    trainer.train()
    assert all(gate.gated for _, _, gate in gates(model))
    assert different(model.eval()) > 10_000
    method.save(model, tmp_path / "before")
    DiffPruningCallback(0.03, 0.0, 0.5).on_train_end(None, None, None, model=model)
    method.save(model, tmp_path / "after")
    assert same(load_file(tmp_path / "before" / SPARSE_FILE), load_file(tmp_path / "after" / SPARSE_FILE))


def test_diff_pruning_projects_the_best_model_of_the_first_phase(tmp_path: Path) -> None:
    method = make_method("diff_pruning", sparsity=0.03, gated_share=0.5)
    model = method.prepare(fresh())
    values = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    # A metric that is best at the first evaluation.
    trainer = trainer_for(
        method, model, "bert-sequence", tmp_path, max_steps=8, metric_for_best_model="falling", **values
    )
    scores = iter(range(10, 0, -1))
    trainer.compute_metrics = lambda prediction: {"falling": float(next(scores))}
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert different(model.eval()) == round(0.03 * 17712)
    assert not any(gate.gated for _, _, gate in gates(model))


def test_diff_pruning_groups_its_parameters(tmp_path: Path) -> None:
    method = make_method("diff_pruning", gated_share=0.5, gate_learning_rate=0.2)
    model = method.prepare(fresh())
    rates: dict[str, set[float]] = {"differences": set(), "gates": set(), "head": set()}

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            for name, group in zip(("differences", "gates", "head", "head"), optimizer.param_groups, strict=True):
                rates[name].add(group["lr"])

    trainer = trainer_for(method, model, "bert-sequence", tmp_path, Rates(), max_steps=6, lr_scheduler_type="constant")
    trainer.train()
    assert rates == {"differences": {1e-2}, "gates": {0.2}, "head": {1e-2}}
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0, 0.1, 0.0]
    assert sum(p.numel() for group in groups for p in group["params"]) == 2 * 17712 + 99
    # Three steps with gates, three with the mask: the moments of the first are forgotten.
    state = trainer.optimizer.state
    for _, _, gate in gates(model):
        assert gate.alpha not in state
        assert state[gate.difference]["step"] == 3


def test_diff_pruning_goes_through_the_schedule_in_each_phase(tmp_path: Path) -> None:
    def rates(folder: Path, method: Method, steps: int, more: int = 0) -> list[list[float]]:
        seen: list[list[float]] = []

        class Rates(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
                seen.append([group["lr"] for group in optimizer.param_groups][-4:])

        values = {"lr_scheduler_type": "linear", "warmup_steps": 0.2, "save_steps": 4, "save_strategy": "steps"}
        trainer = trainer_for(
            method, method.prepare(fresh()), "bert-sequence", folder, Rates(), max_steps=steps, **values
        )
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{more}") if more else None)
        return seen

    alone = [difference for difference, *_ in rates(tmp_path / "a", DiffPruning(0.03, gated_share=0.99), 5)]
    found = rates(tmp_path / "b", DiffPruning(0.03, tuned_scale=10.0), 10)
    differences, gate_rates, head, _ = zip(*found, strict=True)
    assert max(alone) == pytest.approx(1e-2)
    assert differences[:5] == head[:5] == pytest.approx(alone)
    assert differences[5:] == head[5:] == pytest.approx([10 * rate for rate in alone])
    assert gate_rates[:5] == pytest.approx([10 * rate for rate in alone])  # 0.1 by default
    for at in (4, 8):  # before and after the projection
        resumed = rates(tmp_path / "b", DiffPruning(0.03, tuned_scale=10.0), 10, more=at)
        assert resumed == found[at:]


def test_gates_have_the_gradients_of_the_formula() -> None:
    tensor, difference = torch.randn(40, 5), torch.randn(40, 5, requires_grad=True)
    alpha = (3 * torch.randn(40, 5)).requires_grad_()
    torch.manual_seed(1)
    found = _SampledGates.apply(tensor, difference, alpha)
    torch.manual_seed(1)
    noise = torch.empty(40, 5).uniform_(1e-4, 1 - 1e-4)
    stretched = torch.sigmoid(noise.log() - (1 - noise).log() + alpha) * (UPPER - LOWER) + LOWER
    z = stretched.clamp(min=0, max=1)
    expected = tensor + z * difference
    assert torch.allclose(found, expected, atol=1e-6)
    assert 0 < (z == 0).sum() < z.numel()
    assert 0 < (z == 1).sum() < z.numel()
    weights = torch.randn(40, 5)
    ours = torch.autograd.grad((found * weights).sum(), (difference, alpha))
    theirs = torch.autograd.grad((expected * weights).sum(), (difference, alpha))
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, atol=1e-5)


def test_the_penalty_is_the_gradient_of_the_expected_number_of_gates() -> None:
    gate = GatedDifference(torch.zeros(50), alpha=0.0)
    with torch.no_grad():
        gate.alpha.copy_(torch.linspace(-4, 4, 50))
    expected_gates = torch.sigmoid(gate.alpha - math.log(-LOWER / UPPER))
    (gradient,) = torch.autograd.grad(0.3 * expected_gates.sum(), gate.alpha)
    gate.add_penalty(0.3)
    assert torch.allclose(gate.alpha.grad, gradient)
    gate.add_penalty(0.3)
    assert torch.allclose(gate.alpha.grad, 2 * gradient)
    # And the expectation is that of what is drawn.
    with torch.no_grad():
        gate.difference.fill_(1.0)
    drawn = torch.stack([gate(torch.zeros(50)) > 0 for _ in range(4000)]).float().mean(0)
    assert (drawn - expected_gates).abs().max() < 0.05


def test_a_stronger_penalty_closes_gates(tmp_path: Path) -> None:
    opened = []
    for penalty in (0.0, 1e-2):
        method = make_method("diff_pruning", sparsity=0.03, penalty=penalty, gate_learning_rate=1.0, gated_share=0.9)
        model = method.prepare(fresh())
        trainer_for(method, model, "bert-sequence", tmp_path, max_steps=20).train()
        opened.append(sum(int((gate.alpha > 0).sum()) for _, _, gate in gates(model)))
    assert opened[1] < 0.1 * opened[0]


def test_diff_pruning_refuses_what_it_cannot_do() -> None:
    callback = DiffPruningCallback(0.01, 1e-7, 0.5)
    with pytest.raises(ValueError, match="max_grad_norm"):
        callback.on_train_begin(SimpleNamespace(fp16=True, max_grad_norm=0.0), None, None, model=fresh())
    settings = SimpleNamespace(fp16=False)
    for scheduler in (None, torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)]), 1)):
        with pytest.raises(ValueError, match="lr_scheduler_type"):
            callback.on_train_begin(settings, None, None, model=fresh(), lr_scheduler=scheduler)
    with pytest.raises(ValueError, match="tuned_scale=0"):
        make_method("diff_pruning", tuned_scale=0)
    with pytest.raises(ValueError, match="sparsity=5"):
        make_method("diff_pruning", sparsity=5)


# --- adapter ---------------------------------------------------------------------------------------------------------


def test_adapter_starts_close_to_the_identity() -> None:
    for arch in ARCHS:
        base = outputs(fresh(arch), arch).logits
        near = outputs(make_method("adapter").prepare(fresh(arch)), arch).logits
        assert 0 < (near - base).abs().max() < 1e-3
        hidden = torch.randn(3, 7, 32)
        assert (Bottleneck(32, 64)(hidden) - hidden).abs().max() < 1e-3


@pytest.mark.parametrize("bottleneck", [8, 64, 256])
def test_adapter_has_the_parameters_of_the_papers_formula(bottleneck: int) -> None:
    with torch.device("meta"):
        base = BertForSequenceClassification(BertConfig())
        method = make_method("adapter", bottleneck=bottleneck)
        count = method.trainable(method.prepare(base))
    m, d, layers = bottleneck, 768, 12
    layer = 2 * (2 * m * d + d + m) + 2 * (2 * d)
    assert count.body == layers * layer + 2 * d  # the last two: the LayerNorm of the embeddings
    assert (count.head, count.base) == (1538, 109_482_240)


@pytest.mark.parametrize("arch", ARCHS)
def test_adapter_moves_norms_and_head_only(arch: str) -> None:
    one = run("adapter", arch)
    norms = {
        name
        for name, module in one.base.named_modules()
        if isinstance(module, nn.LayerNorm) and name not in head_modules(one.base)
    }
    assert len(norms) == 5
    expected = {f"{name}.{which}" for name in norms for which in ("weight", "bias")}
    assert moved_in_body(one).keys() == expected
    added = load_file(one.folder / "adapter.safetensors").keys() - expected - head_tensors(one.base).keys()
    assert len(added) == 2 * 2 * 4
    assert all(".bottleneck." in name for name in added)


def test_a_copy_of_a_model_runs_through_its_own_adapters() -> None:
    model = make_method("adapter").prepare(fresh())
    clone = copy.deepcopy(model)
    before = outputs(clone, "bert-sequence").logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bottleneck." in name:
                parameter.add_(1.0)
    assert not torch.equal(outputs(model, "bert-sequence").logits, before)
    assert torch.equal(outputs(clone, "bert-sequence").logits, before)


def test_adapter_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="bottleneck=0"):
        make_method("adapter", bottleneck=0)
    with pytest.raises(ValueError, match=r"MambaForCausalLM: none was found"):
        make_method("adapter").prepare(fresh("mamba-causal_lm"))
    with pytest.raises(ValueError, match="no place for LoRA"):
        make_method("lora").prepare(fresh("mamba-causal_lm"))


# --- names and rates -------------------------------------------------------------------------------------------------


def test_the_methods_are_those_of_the_paper_lora_and_the_default() -> None:
    paper = ["full", "bitfit", "frozen", "rand_uniform", "rand_row_col", "diff_pruning", "adapter"]
    assert sorted(ALL_METHODS) == sorted([*paper, "lora", "bitfit_default"])
    for name in (*NAMES, "bitfit_default"):
        method = make_method(name)
        assert method.name == name
        assert list(method.learning_rates) == sorted(set(method.learning_rates))
    assert make_method("bitfit").learning_rates == (1e-4, 4e-4, 7e-4, 1e-3)
    assert make_method("full").learning_rates == (1e-5, 2e-5, 3e-5, 5e-5)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("bitfit:b_q+b_m2", "bitfit:query+intermediate"),
        ("bitfit:intermediate+query", "bitfit:query+intermediate"),
        ("bitfit:b_m2", "bitfit:intermediate"),
        ("bitfit:all", "bitfit"),
        ("bitfit:query+intermediate+pooler", "bitfit:query+intermediate+pooler"),
    ],
)
def test_names_of_subsets(given: str, name: str) -> None:
    assert make_method(given).name == name


@pytest.mark.parametrize("name", ["bit-fit", "", "full:query", "bitfit:", "adapter:8"])
def test_an_unknown_method_is_an_error_that_lists_them(name: str) -> None:
    with pytest.raises(ValueError, match="full, bitfit, frozen, rand_uniform") as error:
        make_method(name)
    assert repr(name) in str(error.value)


def test_an_unknown_term_is_the_librarys_error() -> None:
    with pytest.raises(UnknownTermError, match="did you mean 'query'"):
        make_method("bitfit:qery")


def test_counting_comes_after_preparing() -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        make_method("full").trainable(fresh())


def test_loading_onto_another_model_is_an_error() -> None:
    for name in ("frozen", "rand_uniform", "adapter", "diff_pruning"):
        with pytest.raises(ValueError, match="does not fit the model"):
            method_for(name).load(fresh("distilbert-sequence"), run(name, "bert-sequence").folder)


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    alone = launch_on_cpu([], "baselines_run.py", tmp_path / "one", batch_size=8)
    two = launch_on_cpu(LAUNCHERS["accelerate"](), "baselines_run.py", tmp_path / "two", batch_size=4)
    for name in METHODS:
        facts = [json.loads((two / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        assert [entry["processes"] for entry in facts] == [2, 2]
        assert [entry["wrapped by"] for entry in facts] == ["DistributedDataParallel"] * 2
        first, second = (load_file(two / f"{name}-{rank}.safetensors") for rank in range(2))
        assert same(first, second), name
        expected = load_file(alone / f"{name}-0.safetensors")
        if name == "diff_pruning":  # each process draws its own gates
            assert facts[0]["body"] == facts[0]["kept"] == round(0.03 * 17712)
            continue
        assert first.keys() == expected.keys()
        assert max((first[key] - expected[key]).abs().max().item() for key in first) < 1e-5, name
