"""Many tasks on one base: every example gets what its own single-task model gives, whatever else is in the batch."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, output_tensors, randomize_, select, snapshot
from bank_tester import ATOL, KINDS, bert_base, kind_of, random_delta, single_model, tokenizer
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from bitfit_hf import (
    BaseModelMismatchError,
    BiasDelta,
    BitFitConfig,
    BitFitError,
    DeltaFormatError,
    DeltaMismatchError,
    TaskBank,
    TaskBankError,
    base_mismatch,
)

TASKS = [f"{kind}-{number}" for number in range(2) for kind in KINDS]  # 20 tasks


@dataclass
class Setting:
    """A bank with 20 tasks of mixed kinds, and each task's own model."""

    base: nn.Module
    bank: TaskBank
    models: dict[str | None, nn.Module]
    deltas: dict[str, BiasDelta]

    def alone(self, task: str | None, encoded: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            return self.models[task](**encoded)

    def check(
        self, encoded: dict[str, torch.Tensor], tasks: Sequence[str | None], bank: TaskBank | None = None
    ) -> None:
        """Each example's answer is its own model's, field by field."""
        answers = (bank or self.bank)(**encoded, tasks=tasks)
        assert len(answers) == len(tasks)
        for task in set(tasks):
            expected = self.alone(task, encoded)
            for example in (i for i, other in enumerate(tasks) if other == task):
                fields = {name for name, value in expected.items() if isinstance(value, torch.Tensor)}
                assert set(answers[example]) == fields
                for name in fields:
                    torch.testing.assert_close(answers[example][name], expected[name][example], rtol=0, atol=ATOL)


@pytest.fixture(scope="module")
def setting() -> Setting:
    base = bert_base()
    bank = TaskBank(base)
    deltas = {name: random_delta(base, kind_of(name), seed=i) for i, name in enumerate(TASKS)}
    for name, delta in deltas.items():
        bank.add_task(name, delta)
    models = {name: single_model(base, delta, kind_of(name)) for name, delta in deltas.items()}
    return Setting(base, bank, {None: base, **models}, deltas)


def text(size: int, seed: int = 0, *, length: int = 9) -> dict[str, torch.Tensor]:
    """A padded batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (size, length), generator=generator)
    lengths = torch.randint(2, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


# --- exactness -------------------------------------------------------------------------------------------------------


def test_twenty_tasks_of_mixed_kinds_equal_their_own_models(setting):
    assert len(TASKS) == 20
    rng = random.Random(0)
    setting.check(text(21), [*TASKS, None])
    setting.check(text(21, 1), [None, *reversed(TASKS)])
    for seed in range(6):
        size = rng.randrange(2, 12)
        setting.check(text(size, seed), rng.choices([*TASKS, None], k=size))


def test_tasks_differ(setting):
    """So that the comparisons above compare something."""
    out = setting.bank(
        **{k: v.expand(3, -1) for k, v in text(1).items()}, tasks=["sequence-2-0", "sequence-2-1", None]
    )
    assert (out.logits[0] - out.logits[1]).abs().max() > 0.01
    hidden = setting.bank(**{k: v.expand(2, -1) for k, v in text(1).items()}, tasks=["backbone-0", None])
    assert (hidden.last_hidden_state[0] - hidden.last_hidden_state[1]).abs().max() > 0.01


@pytest.mark.parametrize("task", ["sequence-2-0", "question-0", "backbone-0", None])
def test_batches_of_one_task(setting, task):
    setting.check(text(4), [task] * 4)
    setting.check(text(1), [task])


def test_what_runs_beside_an_example_does_not_change_it(setting):
    """Adding, removing and re-adding tasks leaves the others' outputs as they were, to the last bit."""
    bank, encoded = TaskBank(setting.base), text(6)
    for name in TASKS[:4]:
        bank.add_task(name, setting.deltas[name])
    tasks = [TASKS[0], TASKS[2], None, TASKS[3], TASKS[0], TASKS[2]]

    def flat() -> list[torch.Tensor]:
        return [tensor for answer in bank(**encoded, tasks=tasks) for tensor in answer.values()]

    before = flat()
    for name in TASKS[4:]:  # past the tables' first capacity, so they grow
        bank.add_task(name, setting.deltas[name])
    assert all(torch.equal(a, b) for a, b in zip(before, flat(), strict=True))
    for name in [TASKS[1], *TASKS[6:]]:
        bank.remove_task(name)
    assert all(torch.equal(a, b) for a, b in zip(before, flat(), strict=True))
    bank.add_task("again", setting.deltas[TASKS[5]])  # takes a row that was given back
    assert all(torch.equal(a, b) for a, b in zip(before, flat(), strict=True))
    again = bank(**encoded, tasks=["again", *tasks[1:]])[0]
    expected = setting.alone(TASKS[5], encoded)
    torch.testing.assert_close(again.logits, expected.logits[0], rtol=0, atol=ATOL)


def test_the_base_alone_is_bit_identical(setting):
    encoded = text(5)
    expected = setting.alone(None, encoded)
    out = setting.bank(**encoded, tasks=[None] * 5)
    assert torch.equal(torch.stack(out.last_hidden_state), expected.last_hidden_state)


def architectures() -> list[Architecture]:
    """Every transformers model of the zoo; for the cheap causal LMs one of each mechanism."""
    return [arch for arch in ARCHITECTURES.values() if arch.is_transformers]


def tuned_pair(arch: Architecture, seed: int, **values: Any) -> tuple[nn.Module, BiasDelta]:
    """A stock model with a random delta written into it, and the delta."""
    config = BitFitConfig(add_missing_biases=arch.bias_free, **values)
    tuned = get_peft_model(randomize_(arch.build()), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "default" in name.split("."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return tuned, BiasDelta.from_model(tuned)


@pytest.mark.parametrize("arch", architectures(), ids=str)
def test_architectures(arch):
    """Encoders, decoders, both; text, images, audio; windows, choices and sequences in the batch dimension."""
    base = randomize_(arch.build())
    bank = TaskBank(base)
    models: dict[str | None, nn.Module] = {None: base}
    for name, seed in (("a", 1), ("b", 2)):
        models[name], delta = tuned_pair(arch, seed)
        bank.add_task(name, delta)
    tasks = ["b", None, "a", "b", "a"]
    encoded = arch.inputs(len(tasks), seed=3)
    answers = bank(**encoded, tasks=tasks)
    compared = 0
    for task in models:
        with torch.no_grad():
            expected = models[task](**encoded)
        for example in (i for i, other in enumerate(tasks) if other == task):
            for name, value in answers[example].items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(value, expected[name][example], rtol=0, atol=ATOL)
                    compared += 1
    assert compared >= len(tasks)
    assert (output_tensors(models["a"](**encoded))[0] - output_tensors(base(**encoded))[0]).abs().max() > 1e-4


def test_deberta_v3():
    """One projection makes keys for the examples and for the positions that they share, and a norm is shared too."""
    config = ARCHITECTURES["deberta_v2-sequence"].build().config
    config.share_att_key = True
    torch.manual_seed(0)
    base = randomize_(transformers.DebertaV2ForSequenceClassification(config).eval())
    bank, models = TaskBank(base), {None: base}
    for name, values in (("a", {}), ("b", {"bias_terms": ["query", "key"]}), ("c", {"bias_terms": "output"})):
        tuned = get_peft_model(copy.deepcopy(base), BitFitConfig(**values)).eval()
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "default" in key.split("."):
                    parameter.normal_(std=0.1)
        models[name] = tuned
        bank.add_task(name, BiasDelta.from_model(tuned))
    encoded = text(7)
    for tasks in (["a", "b", "c", None, "b", "c", "a"], ["b", "c", None, "b", "c", "b", "b"], ["c", None] * 3 + ["c"]):
        out = bank(**encoded, tasks=tasks)
        for example, name in enumerate(tasks):
            with torch.no_grad():
                expected = models[name](**encoded).logits[example]
            torch.testing.assert_close(out.logits[example], expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("name", "terms"),
    [("gpt2-sequence", "query"), ("gpt2-sequence", ["key", "value", "output"]), ("gpt_neox-causal_lm", "value")],
)
def test_slices_of_fused_biases(name, terms):
    arch = ARCHITECTURES[name]
    base = randomize_(arch.build())
    bank = TaskBank(base)
    whole, whole_delta = tuned_pair(arch, 1)
    part, part_delta = tuned_pair(arch, 2, bias_terms=terms)
    bank.add_task("whole", whole_delta)
    bank.add_task("part", part_delta)
    encoded = arch.inputs(4, seed=1)
    answers = bank(**encoded, tasks=["part", "whole", None, "part"])
    for model, examples in ((part, (0, 3)), (whole, (1,)), (base, (2,))):
        with torch.no_grad():
            expected = model(**encoded)
        for example in examples:
            torch.testing.assert_close(answers.logits[example], expected.logits[example], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["t5-sequence", "t5-question", "bart-sequence", "gpt2-sequence", "clip-image"])
def test_task_classes_around_a_bare_backbone(name):
    """The bank is made on the checkpoint's backbone; the delta brings its own class."""
    arch = ARCHITECTURES[name]
    tuned, delta = tuned_pair(arch, 1)
    stock = randomize_(arch.build())
    backbone = stock.base_model
    if backbone is stock:  # a class that holds its backbone itself
        backbone = {"t5-question": transformers.T5Model, "clip-image": transformers.CLIPModel}[name](stock.config)
        missing = backbone.load_state_dict(stock.state_dict(), strict=False)
        assert not [key for key in missing.missing_keys if name == "t5-question" or key.startswith("vision_model")]
    bank = TaskBank(backbone.eval())
    bank.add_task("task", delta)
    encoded = arch.inputs(3)
    with torch.no_grad():
        expected = tuned(**encoded)
    fields = [name for name in ("logits", "start_logits", "end_logits") if expected.get(name) is not None]
    for tasks in (["task"] * 3, ["task", None, "task"]):
        if None in tasks and name == "clip-image":
            continue  # the backbone itself also wants texts
        if None in tasks and arch.family in ("t5", "bart"):
            encoded = {**encoded, "decoder_input_ids": encoded["input_ids"]}
            with torch.no_grad():
                expected = tuned(**encoded)
        answers = bank(**encoded, tasks=tasks)
        for field in fields:
            for example in (0, 2):
                torch.testing.assert_close(answers[example][field], expected[field][example], rtol=0, atol=ATOL)


def test_a_base_that_is_a_task_model_answers_with_its_own_head():
    base = randomize_(ARCHITECTURES["bert-sequence"].build())
    bank = TaskBank(base)
    token = random_delta(base, "token-4", seed=1)
    bank.add_task("tags", token)
    encoded = text(3)
    out = bank(**encoded, tasks=[None, "tags", None])
    with torch.no_grad():
        expected = base(**encoded).logits
    torch.testing.assert_close(out.logits[0], expected[0], rtol=0, atol=ATOL)
    torch.testing.assert_close(out.logits[2], expected[2], rtol=0, atol=ATOL)
    tagger = single_model(base, token, "token-4")
    with torch.no_grad():
        torch.testing.assert_close(out.logits[1], tagger(**encoded).logits[1], rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deltas_in_half_precision(setting, dtype):
    bank = TaskBank(setting.base, dtype=dtype)
    encoded, names = text(6), TASKS[:3]
    for name in names:
        bank.add_task(name, setting.deltas[name])
        rounded = copy.deepcopy(setting.deltas[name])
        rounded._tensors = {key: value.to(dtype).float() for key, value in rounded.items()}
        setting.models[f"rounded-{name}"] = single_model(setting.base, rounded, kind_of(name))
    out = bank(**encoded, tasks=names * 2)
    for example, name in enumerate(names * 2):
        expected = setting.alone(f"rounded-{name}", encoded)
        torch.testing.assert_close(out.logits[example], expected.logits[example], rtol=0, atol=ATOL)


def test_a_base_in_half_precision(setting):
    base = copy.deepcopy(setting.base).to(torch.bfloat16)
    bank = TaskBank(base)
    for name in TASKS[:3]:
        bank.add_task(name, setting.deltas[name])  # the fingerprint knows a rounded base
    encoded = text(6)
    out = bank(**encoded, tasks=TASKS[:3] * 2)
    for example, name in enumerate(TASKS[:3] * 2):
        expected = setting.alone(name, encoded).logits[example]
        assert out.logits[example].dtype == torch.float32  # heads stay so
        torch.testing.assert_close(out.logits[example], expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_batches_go_another_way_to_the_same_answer(setting, monkeypatch, dtype):
    """Copying row by row below a size, by all threads above it."""
    bank = TaskBank(setting.base, dtype=dtype)
    for name in TASKS[:5]:
        bank.add_task(name, setting.deltas[name])
    encoded, tasks = text(6), [*TASKS[:5], None]
    small = bank(**encoded, tasks=tasks)
    monkeypatch.setattr("bitfit_hf.bank.layers._SMALL_OUTPUT", 0)
    large = bank(**encoded, tasks=tasks)
    for one, other in zip(small, large, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


def test_under_autocast(setting):
    """Products are then computed in another dtype than the weights', by the layer's own code."""
    tasks = [TASKS[0], None, TASKS[1], TASKS[0]]
    with torch.autocast("cpu", torch.bfloat16):
        answers = setting.bank(**text(4), tasks=tasks)
        for example, task in enumerate(tasks):
            for name, value in answers[example].items():
                expected = setting.alone(task, text(4))[name][example]
                torch.testing.assert_close(value.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("index", [None, torch.tensor([1, 2])])
def test_rows_that_hold_the_base_stand_for_the_same_biases(index):
    """Tables in float32 keep `b_0 + δ` where a product starts from it."""
    from bitfit_hf.bank.sites import Site
    from bitfit_hf.terms import find_biases

    biases = [bias for bias in find_biases(bert_base()) if bias.term == "query"][:1]
    plain, holding = (Site(0, biases, torch.float32, torch.device("cpu")) for _ in range(2))
    size = plain.size
    base, delta = torch.randn(size), torch.randn(size if index is None else len(index))
    holding.hold(base)
    for site in (plain, holding):
        for _ in range(40):  # past the first capacity
            site.write(site.take(), delta, index)
    rows = torch.tensor([0, 40, 1])
    assert torch.equal(holding.effective_rows(rows, base, torch.float32), plain.effective_rows(rows, base, base.dtype))
    assert torch.equal(holding.effective(40, base, torch.bfloat16), plain.effective(40, base, torch.bfloat16))
    torch.testing.assert_close(holding.delta_rows(rows), plain.delta_rows(rows), rtol=0, atol=1e-6)
    assert not holding.delta_rows(rows)[0].any()


# --- one pass --------------------------------------------------------------------------------------------------------


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_backbone_runs_once_with_a_thousand_tasks(setting):
    bank = TaskBank(setting.base)
    for number in range(1000):
        bank.add_task(f"task-{number}", setting.deltas[TASKS[number % 20]])
    assert len(bank) == 1000
    # A module that no other in the backbone calls; the hook sits in the bank's own copy.
    calls = count_calls(bank._base.backbone.embeddings)
    names = [f"task-{number}" for number in range(0, 1000, 33)]
    bank(**text(len(names)), tasks=names)
    assert len({number % 20 for number in range(0, 1000, 33)}) > 10  # of many kinds
    assert len(calls) == 1
    example = setting.alone(TASKS[99 % 20], text(len(names)))
    torch.testing.assert_close(bank(**text(len(names)), tasks=names)[3].logits, example.logits[3], rtol=0, atol=ATOL)


def test_classes_that_call_the_backbone_differently_get_a_pass_each():
    """Longformer's question answering looks at the question globally, its token classification at nothing."""
    config = transformers.LongformerConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        attention_window=[4], max_position_embeddings=32, pad_token_id=0, sep_token_id=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = randomize_(transformers.LongformerModel(config, add_pooling_layer=False).eval())
    config = BitFitConfig(exclude_modules=["query_global", "key_global", "value_global"])
    models, bank = {}, TaskBank(base)
    for name, cls in (
        ("tags", transformers.LongformerForTokenClassification),
        ("label", transformers.LongformerForSequenceClassification),
    ):
        stock = cls(copy.deepcopy(base.config)).eval()
        stock.longformer.load_state_dict(base.state_dict())
        tuned = get_peft_model(stock, copy.deepcopy(config)).eval()
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "bitfit_" in key:
                    parameter.normal_(std=0.1)
        models[name] = tuned
        bank.add_task(name, BiasDelta.from_model(tuned))
    calls = count_calls(bank._base.backbone.embeddings)
    encoded = text(4, length=8)
    out = bank(**encoded, tasks=["tags", "label", "tags", "label"])
    assert len(calls) == 2
    for example, name in enumerate(["tags", "label"] * 2):
        with torch.no_grad():
            expected = models[name](**encoded).logits[example]
        torch.testing.assert_close(out.logits[example], expected, rtol=0, atol=ATOL)


def test_only_what_needs_it_is_run_task_by_task():
    """DeBERTa shares its relative positions among the examples: its attention is split, the rest is not."""
    arch = ARCHITECTURES["deberta_v2-sequence"]
    base = randomize_(arch.build())
    bank = TaskBank(base)
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        bank.add_task(name, tuned_pair(arch, seed, target_modules=["pos_query_proj"])[1])
    layer = bank._base.backbone.encoder.layer[0]
    outer, inner = count_calls(layer), count_calls(layer.attention.self.query_proj)
    bank(**arch.inputs(5), tasks=["a", "b", "c", "a", "b"])
    assert (len(outer), len(inner)) == (1, 3)
    for name, seed in (("d", 4), ("e", 5)):
        bank.add_task(name, tuned_pair(arch, seed, bias_terms="query+intermediate")[1])
    outer.clear(), inner.clear()
    bank(**arch.inputs(4), tasks=["d", "e", None, "d"])  # no delta that would make it necessary
    assert (len(outer), len(inner)) == (1, 1)


# --- what a bank makes sure of before it serves ----------------------------------------------------------------------


class Toy(BertPreTrainedModel):
    """A backbone of one layer that does something odd with the batch."""

    base_model_prefix = "toy"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.odd(self.embedding(input_ids)))


class SequenceOutside(Toy):
    """Folds the sequence around the batch: consecutive rows are not of one example."""

    def odd(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        rows = self.dense(hidden.transpose(0, 1).reshape(-1, width))
        return rows.view(length, batch, width).transpose(0, 1).tanh()


class Mixing(Toy):
    """Lets examples see each other."""

    def odd(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dense(hidden) - self.dense(hidden).mean(0, keepdim=True) * 0.5


class ReadFromOutside(Toy):
    """Another module than the owner reads the bias."""

    def odd(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.dense.weight, self.dense.bias)


@pytest.mark.parametrize("cls", [SequenceOutside, ReadFromOutside])
def test_layers_that_are_not_what_they_seem_are_still_right(cls):
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    base = randomize_(cls(config).eval())
    bank, models = TaskBank(base), {None: base}
    for name in ("a", "b"):
        tuned = get_peft_model(copy.deepcopy(base), BitFitConfig(modules_to_save=[])).eval()
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "bitfit_" in key:
                    parameter.normal_(std=0.5)
        models[name] = tuned
        bank.add_task(name, BiasDelta.from_model(tuned))
    ids = torch.randint(0, 30, (4, 6))
    out = bank(input_ids=ids, tasks=["a", "b", None, "a"])
    for example, name in enumerate(["a", "b", None, "a"]):
        with torch.no_grad():
            expected = models[name](input_ids=ids).last_hidden_state[example]
        torch.testing.assert_close(out.last_hidden_state[example], expected, rtol=0, atol=ATOL)


def test_a_model_that_mixes_examples_is_refused():
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(TaskBankError, match="mixes the examples"):
        TaskBank(Mixing(config))


def test_inputs_that_cannot_be_made_up():
    class Pictures(Toy):
        def forward(self, pictures: torch.Tensor) -> BaseModelOutput:  # type: ignore[override]
            return BaseModelOutput(last_hidden_state=self.dense(pictures))

    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(TaskBankError, match="example_inputs"):
        TaskBank(Pictures(config))
    with pytest.raises(TaskBankError, match="example_inputs"):
        TaskBank(Pictures(config), example_inputs={"pictures": torch.randn(2, 4, 9)})
    bank = TaskBank(Pictures(config), example_inputs={"pictures": torch.randn(2, 4, 8)})
    assert bank(pictures=torch.randn(3, 5, 8), tasks=[None] * 3).last_hidden_state[0].shape == (5, 8)


# --- the given model and the memory ----------------------------------------------------------------------------------


def test_the_given_model_is_left_alone_and_its_weights_are_shared(setting):
    base = bert_base().train()
    before = snapshot(base)
    classes = [type(module) for module in base.modules()]
    bank = TaskBank(base)
    bank.add_task("a", setting.deltas[TASKS[0]])
    bank(**text(3), tasks=["a", None, "a"])
    assert snapshot(base) == before
    assert [type(module) for module in base.modules()] == classes
    assert base.training
    assert not any(module._forward_hooks or "forward" in vars(module) for module in base.modules())
    shared = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in bank._base.model.parameters()} == shared
    assert bank.memory()["base"] == sum(p.numel() * 4 for p in base.parameters()) + sum(
        b.numel() * b.element_size() for b in base.buffers()
    )


def test_memory_is_deltas_and_heads(setting):
    bank = TaskBank(setting.base)
    assert bank.memory()["tasks"] == 0
    deltas = [setting.deltas[name] for name in TASKS]
    for name, delta in zip(TASKS, deltas, strict=True):
        bank.add_task(name, delta)
    memory = bank.memory()
    assert memory["deltas"] == 4 * sum(delta.num_parameters() for delta in deltas)
    assert memory["heads"] == 4 * sum(delta.num_parameters(head=True) - delta.num_parameters() for delta in deltas)
    half = TaskBank(setting.base, dtype=torch.bfloat16)
    for name, delta in zip(TASKS, deltas, strict=True):
        half.add_task(name, delta)
    assert half.memory()["deltas"] * 2 == memory["deltas"]
    for name in TASKS:
        bank.remove_task(name)
    assert bank.memory()["tasks"] == 0
    reserved = bank.memory()["reserved"]
    for name, delta in zip(TASKS, deltas, strict=True):
        bank.add_task(name, delta)
    assert bank.memory()["reserved"] == reserved  # rows are used again


def test_a_thousand_tasks_of_bert_base_size_fit_in_450_megabytes():
    """By the tables that are made for them, without running a model of that size."""
    from bitfit_hf.bank.sites import Site
    from bitfit_hf.terms import Bias, find_biases

    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(BertConfig())
    biases: dict[str, list[Bias]] = {}
    for bias in find_biases(model):
        biases.setdefault(bias.name, []).append(bias)
    head = 768 * 2 + 2
    for dtype, budget in ((torch.float32, 0.45e9), (torch.bfloat16, 0.225e9)):
        total = 1000 * head * 4
        for number, group in enumerate(biases.values()):
            site = Site(number, group, dtype, torch.device("meta"))
            for row in (site.take() for _ in range(1000)):
                if row >= len(site.table):  # the table grows as it would for each task in turn
                    site.write(row, torch.zeros(site.shape, device="meta"), None)
            assert len(site.table) > 1000
            total += site.reserved_bytes
        assert total <= budget


# --- errors ----------------------------------------------------------------------------------------------------------


def describe(bank: TaskBank) -> tuple[Any, ...]:
    return bank.tasks, bank.resident_tasks, bank.memory()


def refused(bank: TaskBank, error: type[BitFitError], match: str, call: Any) -> None:
    """The call ends in this error, and the bank is as it was."""
    before = describe(bank)
    with pytest.raises(error, match=match):
        call()
    assert describe(bank) == before
    assert isinstance(error("x"), BitFitError)


def test_errors_of_requests(setting):
    bank, encoded = setting.bank, text(2)
    known = TASKS[0]
    refused(bank, TaskBankError, "no task 'nobody'", lambda: bank(**encoded, tasks=["nobody", known]))
    refused(bank, TaskBankError, "3 task names", lambda: bank(**encoded, tasks=[known] * 3))
    refused(bank, TaskBankError, "1 task names", lambda: bank(**encoded, tasks=[known]))
    refused(bank, TaskBankError, "empty", lambda: bank(**encoded, tasks=[]))
    refused(bank, TaskBankError, "empty", lambda: bank(input_ids=torch.zeros(0, 3, dtype=torch.long), tasks=[]))
    refused(bank, TaskBankError, "no batch", lambda: bank(tasks=[known]))
    refused(bank, TaskBankError, "list with one name per example", lambda: bank(**encoded, tasks=known))
    refused(bank, TaskBankError, "names and None", lambda: bank(**encoded, tasks=[known, 3]))
    refused(bank, TaskBankError, "labels", lambda: bank(**encoded, labels=torch.zeros(2), tasks=[known] * 2))
    with pytest.raises(ValueError, match="no task"):  # what a caller would catch
        bank(**encoded, tasks=["nobody", None])
    setting.check(encoded, [known, None])


def test_errors_of_removed_tasks(setting):
    bank = TaskBank(setting.base)
    bank.add_task("a", setting.deltas[TASKS[0]])
    bank.add_task("b", setting.deltas[TASKS[1]])
    bank.remove_task("a")
    assert "a" not in bank
    assert "b" in bank
    assert bank.tasks == ["b"]
    refused(bank, TaskBankError, "no task 'a'", lambda: bank(**text(2), tasks=["a", "b"]))
    refused(bank, TaskBankError, "no task 'a'", lambda: bank.remove_task("a"))
    setting.bank  # noqa: B018


def test_errors_of_adding(setting, tmp_path):
    bank, delta = TaskBank(setting.base), setting.deltas[TASKS[0]]
    bank.add_task("a", delta)
    refused(bank, TaskBankError, "already", lambda: bank.add_task("a", delta))
    refused(bank, TaskBankError, "not empty", lambda: bank.add_task("", delta))
    refused(bank, TaskBankError, "BiasDelta.from_model", lambda: bank.add_task("b", setting.base))
    refused(bank, TaskBankError, "revision", lambda: bank.add_task("b", delta, revision="v2"))
    refused(bank, BitFitError, str(tmp_path), lambda: bank.add_task("b", tmp_path))

    other = random_delta(randomize_(bert_base(), seed=9), "sequence-2", seed=1)
    refused(bank, BaseModelMismatchError, "tensors differ", lambda: bank.add_task("b", other))
    foreign = tuned_pair(ARCHITECTURES["gpt2-sequence"], 1)[1]
    refused(bank, DeltaMismatchError, "fits no class", lambda: bank.add_task("b", foreign))
    image = tuned_pair(ARCHITECTURES["vit-image"], 1)[1]
    refused(bank, DeltaMismatchError, "ViTForImageClassification", lambda: bank.add_task("b", image))
    masked = tuned_pair(ARCHITECTURES["bert-masked_lm"], 1)[1]
    refused(bank, TaskBankError, "BertForMaskedLM", lambda: bank.add_task("b", masked))

    nameless = copy.deepcopy(delta)
    nameless.config.task_type = nameless.config.auto_mapping = None
    refused(bank, TaskBankError, "task_type", lambda: bank.add_task("b", nameless))
    smuggled = copy.deepcopy(delta)
    smuggled.config.task_type = None
    smuggled.config.auto_mapping = {"base_model_class": "system", "parent_library": "os"}
    refused(bank, DeltaMismatchError, "'system'", lambda: bank.add_task("b", smuggled))

    delta.save_pretrained(tmp_path / "torn")
    weights = tmp_path / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    refused(bank, DeltaFormatError, "damaged", lambda: bank.add_task("b", tmp_path / "torn"))


def test_deltas_without_a_head_need_the_class_that_they_were_trained_in():
    """Such a delta relies on the output layer that came with the checkpoint."""
    masked = ARCHITECTURES["bert-masked_lm"]
    delta = tuned_pair(masked, 1)[1]

    class Own(transformers.BertForMaskedLM):
        pass

    base = randomize_(Own(masked.build().config).eval())
    bank = TaskBank(base)
    bank.add_task("a", delta)
    assert bank.describe("a")[0] == "Own"
    old = copy.deepcopy(delta)  # before the class was recorded
    old.config.auto_mapping, old.config.task_type = None, "CAUSAL_LM"
    refused(bank, TaskBankError, "BertLMHeadModel", lambda: bank.add_task("b", old))
    causal = ARCHITECTURES["gpt2-causal_lm"]
    old = tuned_pair(causal, 1)[1]
    old.config.auto_mapping, old.config.task_type = None, "CAUSAL_LM"
    bank = TaskBank(randomize_(causal.build()))
    bank.add_task("a", old)
    assert bank.describe("a")[0] == "GPT2LMHeadModel"


def test_another_base_can_be_allowed(setting):
    bank = TaskBank(setting.base)
    other = random_delta(randomize_(bert_base(), seed=9), "sequence-2", seed=1)
    with pytest.warns(UserWarning, match="tensors differ"):
        bank.add_task("a", other, on_base_mismatch="warn")
    with base_mismatch("ignore"):
        bank.add_task("b", other)
    with pytest.raises(BaseModelMismatchError):
        bank.add_task("c", other)


def test_bases_that_cannot_be_served(setting):
    with pytest.raises(TaskBankError, match="stock transformers model"):
        TaskBank(nn.Sequential(nn.Linear(3, 3)))
    wrapped = get_peft_model(bert_base(), BitFitConfig())
    with pytest.raises(TaskBankError, match="adapters injected"):
        TaskBank(wrapped)
    written = ARCHITECTURES["bert-sequence"].build()
    delta = random_delta(written, "sequence-3", seed=0)
    delta.apply_(written)
    with pytest.raises(TaskBankError, match="written into its biases"):
        TaskBank(written)
    for wrong in (0, -1, True, "3"):
        with pytest.raises(TaskBankError, match="max_tasks"):
            TaskBank(setting.base, max_tasks=wrong)
    with pytest.raises(TaskBankError, match="dtype"):
        TaskBank(setting.base, dtype=torch.int8)


def test_a_layer_that_the_trial_did_not_reach_is_an_error_where_it_matters():
    arch = ARCHITECTURES["bert-sequence"]
    base = randomize_(arch.build())
    bank = TaskBank(base)
    bank.add_task("a", tuned_pair(arch, 1)[1])
    layer = bank._base.layers[bank._base.backbone.encoder.layer[0].intermediate.dense]
    layer.batch_axis = None
    refused(bank, TaskBankError, "not reached", lambda: bank(**arch.inputs(2), tasks=["a", None]))
    bank(**arch.inputs(2), tasks=["a", "a"])  # one task: nothing to tell apart


# --- bounded ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(setting, tmp_path) -> dict[str, Path]:
    for name in TASKS[:6]:
        setting.deltas[name].save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in TASKS[:6]}


def test_at_most_so_many_tasks_are_resident(setting, folders):
    bank = TaskBank(setting.base, max_tasks=3)
    one = {}
    for name, folder in folders.items():
        bank.add_task(name, folder)
        one[name] = bank.memory()["tasks"]
    names = list(folders)
    assert bank.tasks == names
    assert bank.resident_tasks == names[3:]
    setting.check(text(2), [names[3], names[5]], bank)  # in memory already
    setting.check(text(2), [names[0], None], bank)  # comes back; the least recently used one goes
    assert bank.resident_tasks == [names[0], names[3], names[5]]
    for round in range(3):
        setting.check(text(3, round), [names[1], names[2], names[4]], bank)
        setting.check(text(3, round), [names[0], names[3], names[5]], bank)
    capacities = {len(site.table) for site in bank._base.sites}
    assert max(capacities) == 4  # three tasks and the base
    refused(bank, TaskBankError, "4 tasks", lambda: bank(**text(4), tasks=names[:4]))


def test_pinned_tasks_stay(setting, folders):
    bank = TaskBank(setting.base, max_tasks=2)
    names = list(folders)
    bank.add_task(names[0], folders[names[0]], pin=True)
    for name in names[1:4]:
        bank.add_task(name, folders[name])
        assert set(bank.resident_tasks) == {names[0], name}
    refused(bank, TaskBankError, "2 tasks", lambda: bank(**text(2), tasks=names[1:3]))
    setting.check(text(2), [names[0], names[1]], bank)
    bank.remove_task(names[3])
    bank.add_task(names[4], folders[names[4]], pin=True)
    refused(bank, TaskBankError, "pinned", lambda: bank.add_task(names[5], folders[names[5]]))
    bank.remove_task(names[0])
    bank.add_task(names[5], folders[names[5]])
    setting.check(text(2), [names[4], names[5]], bank)


def test_a_delta_in_memory_is_a_source_too(setting):
    bank = TaskBank(setting.base, max_tasks=1)
    for name in TASKS[:3]:
        bank.add_task(name, setting.deltas[name])
    for name in TASKS[:3]:
        setting.check(text(2), [name, None], bank)


def test_a_source_that_has_changed_is_not_served_as_if_it_were_the_old_one(setting, folders):
    bank = TaskBank(setting.base, max_tasks=1)
    first, second = TASKS[0], TASKS[1]
    bank.add_task(first, folders[first])
    bank.add_task(second, folders[second])
    (setting.deltas[first] * 0.5).save_pretrained(folders[first])
    refused_names = bank.tasks
    with pytest.raises(TaskBankError, match="another delta"):
        bank(**text(2), tasks=[first, None])
    assert bank.tasks == refused_names
    bank.remove_task(first)
    bank.add_task(first, folders[first])
    bank(**text(2), tasks=[first, None])


def test_a_source_that_is_gone(setting, folders):
    bank = TaskBank(setting.base, max_tasks=1)
    first, second = TASKS[0], TASKS[1]
    bank.add_task(first, folders[first])
    bank.add_task(second, folders[second])
    for file in folders[first].iterdir():
        file.unlink()
    with pytest.raises(BitFitError, match="does not exist"):
        bank(**text(2), tasks=[first, None])
    setting.check(text(2), [second, None], bank)  # it comes back, and the room for it is there


def test_tasks_from_the_hub_stay_at_their_commit(setting, folders, hub, hub_env):
    from huggingface_hub import HfApi

    first, second = TASKS[0], TASKS[1]
    api = HfApi()
    api.create_repo("alice/first")
    api.upload_folder(repo_id="alice/first", folder_path=folders[first])
    bank = TaskBank(setting.base, max_tasks=1)
    bank.add_task(first, "alice/first")
    bank.add_task(second, folders[second])
    setting.deltas[second].save_pretrained(folders[first])
    api.upload_folder(repo_id="alice/first", folder_path=folders[first])
    hub_env.go_offline()
    setting.check(text(2), [first, None], bank)


# --- the answer ------------------------------------------------------------------------------------------------------


def test_the_output_is_a_sequence_and_a_table(setting):
    out = setting.bank(**text(4), tasks=["sequence-3-0", "question-0", "token-4-0", "backbone-0"])
    assert len(out) == 4
    assert [sorted(answer) for answer in out] == [
        ["logits"],
        ["end_logits", "start_logits"],
        ["logits"],
        ["last_hidden_state", "pooler_output"],
    ]
    assert [None if x is None else tuple(x.shape) for x in out.logits] == [(3,), None, (9, 4), None]
    assert out.start_logits[1].shape == (9,)
    assert out.tasks[1] == "question-0"
    assert type(out[1]).__name__ == "QuestionAnsweringModelOutput"
    assert out[-1].last_hidden_state.shape == (9, 32)
    assert not hasattr(out, "nothing")
    with pytest.raises(AttributeError, match="start_logits"):
        out.nothing  # noqa: B018
    assert "4 tasks" in repr(out)
    assert "20" in repr(setting.bank)


def test_hidden_states_come_per_example(setting):
    encoded, tasks = text(3), ["sequence-3-0", None, "backbone-0"]
    out = setting.bank(**encoded, tasks=tasks, output_hidden_states=True)
    for example, task in enumerate(tasks):
        with torch.no_grad():
            expected = setting.models[task](**encoded, output_hidden_states=True)
        assert len(out[example].hidden_states) == 3
        for ours, theirs in zip(out[example].hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs[example], rtol=0, atol=ATOL)


def test_all_kinds_of_the_zoo_are_covered():
    assert {arch.kind for arch in select()} - {"plain"} == {arch.kind for arch in architectures()}
    assert len(architectures()) > 45


# --- predict ---------------------------------------------------------------------------------------------------------

TEXTS = ["a b c", "d e f g h a b c d e", "c", ("a b", "c d e f"), "g h", "b c d a"]


@pytest.fixture(scope="module")
def served() -> tuple[TaskBank, dict[str, nn.Module], Any]:
    base = bert_base()
    words = tokenizer()
    bank, models = TaskBank(base, words), {}
    for seed, kind in enumerate(["sequence-3", "multi-4", "regression", "token-4", "question", "backbone"]):
        delta = random_delta(base, kind, seed=seed)
        bank.add_task(kind, delta)
        models[kind] = single_model(base, delta, kind)
    return bank, models, words


def own(models: dict[str, nn.Module], words: Any, task: str, text: Any) -> Any:
    """The output of a task's own model for one text."""
    parts = (text,) if isinstance(text, str) else text
    with torch.no_grad():
        return models[task](**words(*parts, return_tensors="pt"))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_predict_classifies(served, batch_size):
    bank, models, words = served
    tasks = ["sequence-3", "multi-4", "sequence-3", "regression", "multi-4", "sequence-3"]
    answers = bank.predict(TEXTS, tasks, batch_size=batch_size)
    for text_, task, answer in zip(TEXTS, tasks, answers, strict=True):
        logits = own(models, words, task, text_).logits[0]
        scores = {"sequence-3": logits.softmax(-1), "multi-4": logits.sigmoid(), "regression": logits}[task]
        names = [f"{task}:{i}" for i in range(len(scores))]
        assert answer["label"] == names[int(scores.argmax())]
        assert answer["score"] == pytest.approx(scores.max().item(), abs=ATOL)
        assert answer["scores"] == pytest.approx(dict(zip(names, scores.tolist(), strict=True)), abs=ATOL)


def test_predict_tags_tokens(served):
    bank, models, words = served
    for text_, answer in zip(TEXTS, bank.predict(TEXTS, ["token-4"] * len(TEXTS), batch_size=3), strict=True):
        parts = (text_,) if isinstance(text_, str) else text_
        assert [entity["word"] for entity in answer] == " ".join(parts).split()
        logits = own(models, words, "token-4", text_).logits[0]
        for entity in answer:
            assert entity["entity"] == f"token-4:{int(logits[entity['index']].argmax())}"
            assert entity["score"] == pytest.approx(logits[entity["index"]].softmax(-1).max().item(), abs=ATOL)


def test_predict_answers_questions(served):
    bank, models, words = served
    pairs = [("a b", "c d e f g h"), ("h", "a b c d"), ("a", "b")]
    for (question, context), answer in zip(pairs, bank.predict(pairs, ["question"] * 3), strict=True):
        assert answer["answer"] == context[answer["start"] : answer["end"]]
        out = own(models, words, "question", (question, context))
        encoded = words(question, context)
        inside = [i for i, part in enumerate(encoded.sequence_ids()) if part == 1]
        start, end = (logits[0][inside].softmax(-1) for logits in (out.start_logits, out.end_logits))
        best = max((start[i] * end[j]).item() for i in range(len(inside)) for j in range(i, len(inside)))
        assert answer["score"] == pytest.approx(best, abs=ATOL)
    with pytest.raises(TaskBankError, match="pairs"):
        bank.predict(["a b"], ["question"])


def test_predict_returns_hidden_states_without_padding(served):
    bank, models, words = served
    answers = bank.predict(TEXTS, ["backbone", None, "backbone", "backbone", None, "backbone"])
    for example in (0, 2, 3, 5):
        expected = own(models, words, "backbone", TEXTS[example])
        torch.testing.assert_close(
            answers[example]["last_hidden_state"], expected.last_hidden_state[0], rtol=0, atol=ATOL
        )


def test_predict_mixes_kinds_and_sorts_by_length(served, capsys):
    bank, _, _ = served
    texts = [" ".join("abcdefgh"[: 1 + i // 5]) for i in range(40)]  # the shortest first
    tasks = [["sequence-3", "token-4", "regression", None][i % 4] for i in range(40)]
    bank.predict(texts[:4], tasks[:4])  # what padding does is tried once for each class, on a text of the bank's own
    lengths: list[int] = []
    hook = bank._base.backbone.embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answers = bank.predict(texts, tasks, batch_size=8, progress=True)
    hook.remove()
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == 5
    assert "predict" in capsys.readouterr().err
    tagged = [i for i, task in enumerate(tasks) if task == "token-4"]
    assert len({texts[i] for i in tagged}) == 8
    for i in tagged:
        assert [entity["word"] for entity in answers[i]] == texts[i].split()
    bank.predict(texts[:2], tasks[:2])
    assert "predict" not in capsys.readouterr().err


def test_predict_truncates_to_what_the_model_takes(served):
    bank, _, _ = served
    (answer,) = bank.predict([" ".join("abcdefgh" * 20)], ["token-4"])
    assert len(answer) == 32 - 2


def test_one_text_and_one_name_for_many(served):
    bank, _, _ = served
    for task in ("sequence-3", "token-4"):
        assert bank.predict("a b c", task) == bank.predict(["a b c"], [task])
        assert bank.predict(["a b", "c"], task) == bank.predict(["a b", "c"], [task] * 2)
    (base,), many = bank.predict("a", None), bank.predict(["a", "b c"], None)
    assert torch.equal(base["last_hidden_state"], bank.predict(["a"], [None])[0]["last_hidden_state"])
    assert len(many) == 2
    assert bank.predict([("a", "b c")], "question") == bank.predict([("a", "b c")], ["question"])


def test_errors_of_predict(served, setting):
    bank, _, words = served
    refused(setting.bank, TaskBankError, "no tokenizer", lambda: setting.bank.predict(["a"], [TASKS[0]]))
    refused(bank, TaskBankError, "no texts", lambda: bank.predict([], []))
    refused(bank, TaskBankError, "lists", lambda: bank.predict("a", ["sequence-3"]))
    refused(bank, TaskBankError, r"lists .* got texts=None", lambda: bank.predict(None, "sequence-3"))
    refused(bank, TaskBankError, r"lists .* got tasks=3 \(int\)", lambda: bank.predict(["a"], 3))
    refused(bank, TaskBankError, r"tasks=\['x'\] for texts=\['a', 'b'\]", lambda: bank.predict(["a", "b"], ["x"]))
    refused(bank, TaskBankError, r"got \['x'\] \(list\)", lambda: bank.predict(["a"], [["x"]]))
    refused(bank, TaskBankError, "1 task names for 2", lambda: bank.predict(["a", "b"], ["sequence-3"]))
    refused(bank, TaskBankError, "no task 'x'", lambda: bank.predict(["a"], ["x"]))
    refused(bank, TaskBankError, "pair of strings", lambda: bank.predict([("a", "b", "c")], ["sequence-3"]))
    refused(bank, TaskBankError, "batch_size", lambda: bank.predict(["a"], ["sequence-3"], batch_size=0))
    unpadded = copy.deepcopy(words)
    unpadded.pad_token = None
    with pytest.raises(TaskBankError, match="padding token"):
        TaskBank(setting.base, unpadded).predict(["a"], [None])


def test_auto_model_backbone_and_saved_deltas_go_together(setting, tmp_path):
    """As a user has them: a checkpoint folder and delta folders."""
    setting.base.save_pretrained(tmp_path / "base")
    setting.deltas["question-0"].save_pretrained(tmp_path / "qa")
    bank = TaskBank(AutoModel.from_pretrained(tmp_path / "base"))
    assert isinstance(bank._base.model, BertModel)
    bank.add_task("question-0", tmp_path / "qa")
    setting.check(text(3), ["question-0", None, "question-0"], bank)


def test_states_that_have_the_batch_in_another_place():
    """XLNet's `mems` are `(tokens, batch, width)`; here there are as many examples as tokens."""
    arch = ARCHITECTURES["xlnet-sequence"]
    base = randomize_(arch.build())
    bank = TaskBank(base)
    tuned, delta = tuned_pair(arch, 1)
    bank.add_task("a", delta)
    for size in (7, 4):
        encoded, tasks = arch.inputs(size, seed=2), (["a", None] * 4)[:size]
        out = bank(**encoded, tasks=tasks)
        for example, name in enumerate(tasks):
            with torch.no_grad():
                expected = (base if name is None else tuned)(**encoded)
            assert set(out[example]) == {"logits", "mems"}
            for ours, column, theirs in zip(out[example].mems, out.mems[example], expected.mems, strict=True):
                torch.testing.assert_close(ours, theirs[:, example], rtol=0, atol=ATOL)
                assert torch.equal(ours, column)
