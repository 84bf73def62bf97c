"""The base under a bank: it is shared, not copied, so whatever is written into it is noticed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, randomize_
from bank_tester import ATOL, bert_base, random_delta, single_model
from torch import nn
from transformers import GPT2Config, GPT2Model

from bitfit_hf import BiasDelta, TaskBank, TaskBankError, base_mismatch, load_delta

ENCODED = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7], [8, 7, 6, 5]])}
TASKS = ["a", None, "b"]


class Setting:
    """A bank with two tasks on a task model, so that its base may be tuned too."""

    def __init__(self, **values: Any) -> None:
        self.base = ARCHITECTURES["bert-sequence"].build()
        randomize_(self.base)
        self.deltas = {name: random_delta(self.base, "sequence-3", seed=seed) for seed, name in enumerate("abc")}
        self.bank = TaskBank(self.base, **values)
        for name in "ab":
            self.bank.add_task(name, self.deltas[name])
        self.before = self.answers()

    def answers(self) -> list[torch.Tensor]:
        return list(self.bank(**ENCODED, tasks=TASKS).logits)

    def unchanged(self) -> bool:
        return all(torch.equal(one, other) for one, other in zip(self.answers(), self.before, strict=True))

    def refused(self, match: str) -> None:
        """Requests and additions alike; what the bank has stays."""
        for call in (
            self.answers,
            lambda: self.bank(**ENCODED, tasks=[None] * 3),
            lambda: self.bank.add_task("c", self.deltas["c"]),
        ):
            with pytest.raises(TaskBankError, match=match):
                call()
        with base_mismatch("ignore"), pytest.raises(TaskBankError, match=match):
            self.answers()
        assert self.bank.tasks == ["a", "b"]


def bias_of(model: nn.Module) -> torch.Tensor:
    return model.base_model.encoder.layer[1].output.dense.bias


def weight_of(model: nn.Module) -> torch.Tensor:
    return model.base_model.encoder.layer[1].output.dense.weight


# --- noticed ---------------------------------------------------------------------------------------------------------


def test_a_delta_that_is_loaded_into_the_base(tmp_path):
    setting = Setting()
    setting.deltas["c"].save_pretrained(tmp_path)
    load_delta(setting.base, tmp_path)
    setting.refused(r"(?s)written into .* since the bank was made.*encoder\.layer\.0")
    BiasDelta.from_pretrained(tmp_path).remove_(setting.base)
    assert setting.unchanged()  # the base is back bit for bit, and so is the bank
    setting.bank.add_task("c", setting.deltas["c"])


@torch.no_grad()
def by_hand(setting: Setting) -> None:
    bias_of(setting.base).add_(0.1)


@torch.no_grad()
def a_weight(setting: Setting) -> None:
    weight_of(setting.base)[3, 4] = 0.0


def a_state_dict(setting: Setting) -> None:
    other = randomize_(ARCHITECTURES["bert-sequence"].build(), seed=7)
    setting.base.load_state_dict(other.state_dict())


def a_step(optimizer: type[torch.optim.Optimizer], **values: Any) -> Any:
    def train(setting: Setting) -> None:
        model = setting.base.train()
        chosen = optimizer(model.parameters(), lr=1e-3, **values)
        model(**ENCODED, labels=torch.tensor([0, 1, 2])).loss.backward()
        chosen.step()

    return train


@pytest.mark.parametrize(
    ("write", "tensor"),
    [
        (by_hand, r"encoder\.layer\.1\.output\.dense\.bias"),
        (a_weight, r"encoder\.layer\.1\.output\.dense\.weight"),
        (a_state_dict, r"embeddings\.word_embeddings\.weight"),
        (a_step(torch.optim.SGD), r"encoder\.layer\.0"),
        (a_step(torch.optim.AdamW, foreach=True), r"encoder\.layer\.0"),
        (a_step(torch.optim.AdamW, fused=True), "bert"),  # counts as no write: seen by the values
    ],
    ids=["bias", "weight", "load_state_dict", "sgd", "adamw", "adamw_fused"],
)
def test_writing_into_the_base(write, tensor):
    setting = Setting()
    write(setting)
    setting.refused(rf"(?s)written into.*{tensor}.*make a new bank")


def test_a_bias_that_is_written_back_is_as_good_as_new():
    setting = Setting()
    bias = bias_of(setting.base)
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.zero_()
    setting.refused("written into")
    with torch.no_grad():
        bias.copy_(kept)
    assert setting.unchanged()


def test_what_goes_past_torchs_counting_is_noticed_where_values_are_compared():
    """`.data` is not counted. Each request compares one tensor's values in turn, and adding a task those of all."""
    setting = Setting()
    bias_of(setting.base).data.mul_(2)
    with pytest.raises(TaskBankError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        setting.bank.add_task("c", setting.deltas["c"])

    later = Setting()
    weight_of(later.base).data.mul_(2)
    tensors = len(dict(later.base.named_parameters())) + len(dict(later.base.named_buffers()))

    def ask() -> None:
        for _ in range(tensors):
            later.answers()

    with pytest.raises(TaskBankError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        ask()
    later.refused(r"encoder\.layer\.1\.output\.dense\.weight")  # and from then on by each
    weight_of(later.base).data.div_(2)
    assert later.unchanged()


# --- without effect --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.to("meta"),
        lambda model: model.train(),
        lambda model: setattr(model.base_model.encoder.layer[0].output.dense, "bias", None),
        lambda model: setattr(weight_of(model), "data", torch.zeros(32, 40)),
        lambda model: setattr(model, "classifier", nn.Linear(32, 9)),
        lambda model: model.resize_token_embeddings(80),
        lambda model: setattr(model.config, "problem_type", "regression"),
    ],
    ids="bfloat16 half device train module data head embeddings config".split(),
)
def test_what_happens_to_the_given_model_alone(change):
    """The bank has modules and parameters of its own; only the memory of the weights is shared."""
    setting = Setting()
    change(setting.base)
    assert setting.unchanged()
    setting.bank.add_task("c", setting.deltas["c"])
    assert setting.bank(**ENCODED, tasks=["c"] * 3).logits[0].dtype is torch.float32


def test_a_converted_base_comes_back_without_harm():
    """Memory that was given free may be taken again for other values."""
    setting = Setting()
    for dtype in (torch.bfloat16, torch.float32):
        setting.base.to(dtype)
    assert setting.unchanged()


def test_training_another_task_on_the_same_model_disturbs_nobody():
    from peft import get_peft_model

    from bitfit_hf import BitFitConfig

    setting = Setting()
    tuned = get_peft_model(setting.base, BitFitConfig())
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    tuned(**ENCODED, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    assert setting.unchanged()
    setting.bank.add_task("c", BiasDelta.from_model(tuned))
    with torch.no_grad():
        expected = tuned.eval()(**ENCODED).logits
    torch.testing.assert_close(
        torch.stack(setting.bank(**ENCODED, tasks=["c"] * 3).logits), expected, rtol=0, atol=ATOL
    )


def test_a_base_of_tensors_that_count_nothing():
    """What is loaded in inference mode cannot be written into outside it, and torch counts nothing."""
    with torch.inference_mode():
        base = bert_base()
    assert next(base.parameters()).is_inference()
    bank = TaskBank(base)
    delta = random_delta(bert_base(), "sequence-3", seed=1)
    bank.add_task("a", delta)
    with torch.no_grad():
        expected = single_model(bert_base(), delta, "sequence-3")(**ENCODED).logits
    out = bank(**ENCODED, tasks=["a", None, "a"])
    torch.testing.assert_close(out.logits[2], expected[2], rtol=0, atol=ATOL)


def test_tied_weights_stay_tied_and_nothing_is_copied():
    model = ARCHITECTURES["bert-masked_lm"].build()
    bank = TaskBank(model)
    assert bank._base.model.cls.predictions.decoder.weight is bank._base.model.get_input_embeddings().weight
    own = {tensor.data_ptr() for tensor in (*bank._base.model.parameters(), *bank._base.model.buffers())}
    assert own == {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert len(list(bank._base.model.parameters())) == len(list(model.parameters()))


# --- a delta of the user's -------------------------------------------------------------------------------------------


def test_a_delta_that_is_edited_later_does_not_change_its_task():
    base = bert_base()
    bank = TaskBank(base, max_tasks=1)
    deltas = {name: random_delta(base, "sequence-3", seed=seed) for seed, name in enumerate("ab")}
    bank.add_task("a", deltas["a"])
    before, labels = bank(**ENCODED, tasks=["a"] * 3).logits, bank.describe("a")
    for tensor in (*deltas["a"].values(), *deltas["a"].head.values()):
        tensor.mul_(3)
    deltas["a"].config.id2label = {0: "x", 1: "y", 2: "z"}
    bank.add_task("b", deltas["b"])  # "a" makes room, and is read again
    assert bank.resident_tasks == ["b"]
    assert all(map(torch.equal, bank(**ENCODED, tasks=["a"] * 3).logits, before))
    assert bank.describe("a") == labels


def test_a_bank_without_a_limit_keeps_no_second_copy():
    import gc
    import weakref

    setting = Setting()
    setting.bank.add_task("c", setting.deltas["c"], pin=True)
    gone = [weakref.ref(delta) for delta in setting.deltas.values()]
    setting.deltas.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert setting.unchanged()


# --- odd bases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{}, {"eos_token_id": 64}, {"eos_token_id": -1}, {"pad_token_id": 63, "eos_token_id": [50256, 3]}],
    ids=str,
)
def test_special_tokens_outside_the_vocabulary(values):
    """GPT-2's end of text is 50256, and stays so in a configuration with fewer words."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=40, n_positions=16, **values)
    torch.manual_seed(0)
    base = randomize_(GPT2Model(config).eval())
    bank = TaskBank(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = bank(**ENCODED, tasks=[None] * 3)
    with torch.no_grad():
        assert torch.equal(torch.stack(out.last_hidden_state), base(**ENCODED).last_hidden_state)
