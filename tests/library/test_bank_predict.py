"""Texts in, labels and scores out: an answer is the same alone and in any batch, whatever is padded for it."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, randomize_
from bank_tester import ATOL, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, RobertaConfig, RobertaModel
from transformers.modeling_outputs import BaseModelOutput

from bitfit_hf import BiasDelta, BitFitConfig, TaskBank, TaskBankError

HIDDEN, LONGEST, MOST_LABELS = 8, 14, 12
# Classes, and whether their tasks differ in the number of labels.
CLASSES = {
    "BertForSequenceClassification": range(1, MOST_LABELS + 1),
    "BertForTokenClassification": range(2, MOST_LABELS + 1),
    "BertForQuestionAnswering": [2],
    "BertModel": [0],
}


def small_bert(**values: Any) -> nn.Module:
    """So narrow that lengths, widths and numbers of labels often coincide."""
    config = BertConfig(
        vocab_size=12, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=10,
        max_position_embeddings=LONGEST, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **values,
    )  # fmt: skip
    torch.manual_seed(0)
    return randomize_(BertModel(config)).eval()


def delta_on(base: nn.Module, class_name: str, seed: int, **values: Any) -> BiasDelta:
    """A random delta of a task of this class."""
    config = copy.deepcopy(base.config)
    for name, value in values.items():
        setattr(config, name, value)
    model = getattr(transformers, class_name)(config).eval()
    model.base_model.load_state_dict(base.state_dict(), strict=False)
    tuned = get_peft_model(model, BitFitConfig()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "default" in name.split("."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return BiasDelta.from_model(tuned)


@cache
def served() -> TaskBank:
    """A bank with a task for every class and number of labels."""
    base = small_bert()
    bank = TaskBank(base, tokenizer())
    for class_name, counts in CLASSES.items():
        for count in counts:
            values = {"num_labels": count} if count else {}
            bank.add_task(f"{class_name}-{count}", delta_on(base, class_name, count, **values))
    multi = delta_on(
        base, "BertForSequenceClassification", 99, num_labels=7, problem_type="multi_label_classification"
    )
    bank.add_task("multi-7", multi)
    return bank


def words(count: int, start: int = 0) -> str:
    return " ".join("abcdefgh"[(start + i) % 8] for i in range(count))


def assert_same(one: Any, other: Any) -> None:
    """Equal structure, equal tensors up to rounding."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=ATOL)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=ATOL)
    else:
        assert one == other


def alone(bank: TaskBank, text: Any, task: str | None) -> Any:
    (answer,) = bank.predict([text], [task])
    return answer


@st.composite
def requests(draw: Any) -> tuple[list[Any], list[str | None]]:
    """Texts of all lengths, each for some task; pairs where the task takes pairs."""
    names = [*served().tasks, None]
    texts, tasks = [], []
    for name in draw(st.lists(st.sampled_from(names), min_size=2, max_size=10)):
        length, start = draw(st.integers(1, LONGEST - 2)), draw(st.integers(0, 7))
        if name is not None and "Question" in name:
            first = draw(st.integers(1, LONGEST - 4))
            texts.append((words(first, start), words(draw(st.integers(1, LONGEST - 3 - first)), start + first)))
        else:
            texts.append(words(length, start))
        tasks.append(name)
    return texts, tasks


@settings(max_examples=60, deadline=None)
@given(requests(), st.integers(1, 11))
def test_an_answer_is_the_same_alone_and_in_any_batch(request_, batch_size):
    texts, tasks = request_
    answers = served().predict(texts, tasks, batch_size=batch_size)
    for text, task, answer in zip(texts, tasks, answers, strict=True):
        assert_same(answer, alone(served(), text, task))


@pytest.mark.parametrize("labels", range(3, MOST_LABELS + 1))
def test_as_many_labels_as_the_longest_text_has_tokens(labels):
    task = f"BertForSequenceClassification-{labels}"
    short, long = alone(served(), "c", task), served().predict(["c", words(labels - 2)], [task] * 2)
    assert len(long[0]["scores"]) == labels
    assert_same(long[0], short)


def test_a_pooled_vector_as_wide_as_the_longest_text_has_tokens():
    answers = served().predict(["c", words(HIDDEN - 2)], [None, "BertModel-0"])
    assert [tuple(answer["pooler_output"].shape) for answer in answers] == [(HIDDEN,)] * 2
    assert [tuple(answer["last_hidden_state"].shape) for answer in answers] == [(3, HIDDEN), (HIDDEN, HIDDEN)]


def test_layers_and_attentions_come_without_padding():
    """Attentions have the sequence twice, and as many heads as a text here has tokens."""
    base = small_bert(output_hidden_states=True, output_attentions=True, attn_implementation="eager")
    bank = TaskBank(base, tokenizer())
    bank.add_task("a", delta_on(base, "BertModel", 1))
    texts = ["c", words(2), words(9)]
    for text, answer in zip(texts, bank.predict(texts, ["a", None, "a"]), strict=True):
        length = len(text.split()) + 2
        assert [tuple(layer.shape) for layer in answer["attentions"]] == [(2, length, length)]
        assert [tuple(layer.shape) for layer in answer["hidden_states"]] == [(length, HIDDEN)] * 2
        assert_same(answer, alone(bank, text, "a" if text != texts[1] else None))


# --- padding ---------------------------------------------------------------------------------------------------------


def text_architectures() -> list[Architecture]:
    """Those that take nothing but texts."""
    kinds = ("sequence", "token", "question", "backbone", "masked_lm", "causal_lm")
    found = [arch for arch in ARCHITECTURES.values() if arch.is_transformers and arch.kind in kinds]
    return [arch for arch in found if "input_ids" in arch.inputs() and arch.family != "whisper"]


def on(arch: Architecture, side: str) -> TaskBank:
    """A bank with one task on a model of the zoo, whose tokenizer pads on this side."""
    pads = tokenizer()
    pads.padding_side = side
    pads.model_input_names = ["input_ids", "attention_mask"]
    base = randomize_(arch.build())
    bank = TaskBank(base, pads)
    tuned = get_peft_model(copy.deepcopy(base), BitFitConfig(add_missing_biases=arch.bias_free)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "default" in name.split("."):
                parameter.normal_(std=0.1)
    bank.add_task("a", BiasDelta.from_model(tuned))
    return bank


def test_the_architectures_that_take_texts_are_tried():
    assert len(text_architectures()) > 30


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", text_architectures(), ids=str)
def test_padding_changes_no_answer_of_any_architecture(arch, side):
    """Whatever the tokenizer says: with padding on the left BERT and GPT-2 count positions wrongly, and XLNet sums a
    text up at its last position, which is padding if it stands on the right."""
    bank = on(arch, side)
    texts: list[Any] = ["c", words(3), words(10), words(6, 3)]
    if arch.kind == "question":
        texts = [(words(2), text) for text in texts]
    tasks = ["a", None, "a", "a"]
    for text, task, answer in zip(texts, tasks, bank.predict(texts, tasks), strict=True):
        assert_same(answer, alone(bank, text, task))


class Halving(BertPreTrainedModel):
    """A backbone that makes the sequence shorter, as Funnel does, and looks at padding as at anything else."""

    base_model_prefix = "halving"

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        hidden = self.dense(self.embedding(input_ids))
        return BaseModelOutput(last_hidden_state=hidden[:, ::2] + hidden.mean(1, keepdim=True))


def test_texts_that_may_not_be_padded_run_with_those_of_their_length():
    torch.manual_seed(0)
    bank = TaskBank(randomize_(Halving(BertConfig(vocab_size=12, hidden_size=8)).eval()), tokenizer())
    texts = [words(n, n) for n in (1, 4, 2, 4, 1, 4)]
    expected = [alone(bank, text, None) for text in texts]
    sizes: list[tuple[int, ...]] = []
    bank._base.backbone.embedding.register_forward_hook(lambda _, args, output: sizes.append(args[0].shape))
    for answer, own in zip(bank.predict(texts, [None] * 6), expected, strict=True):
        assert_same(answer, own)
    assert sizes == [(3, 6), (1, 4), (2, 3)]


# --- how long a text may be ------------------------------------------------------------------------------------------


def roberta(**values: Any) -> nn.Module:
    config = RobertaConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=10,
        max_position_embeddings=18, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, **values,
    )  # fmt: skip
    torch.manual_seed(0)
    return randomize_(RobertaModel(config)).eval()


def roberta_tokenizer() -> Any:
    """Without a limit of its own, and with RoBERTa's padding id."""
    pads = tokenizer()
    pads.pad_token = "[CLS]"
    pads.model_input_names = ["input_ids", "attention_mask"]
    return pads


def test_positions_that_stand_for_padding_are_not_used_for_words():
    """RoBERTa counts from behind its padding id: of 18 positions it uses 16."""
    bank = TaskBank(roberta(), roberta_tokenizer())
    assert bank.max_length == 16
    assert alone(bank, words(15), None)["last_hidden_state"].shape == (16, 8)
    for limit, length in ((17, 16), (18, 16), (1000, 16), (10, 10)):  # the tokenizer's own, where it is less
        bank.tokenizer.model_max_length = limit
        assert alone(bank, words(40), None)["last_hidden_state"].shape == (length, 8)


def test_the_tokenizer_says_how_much_a_model_without_a_table_of_positions_takes():
    arch = ARCHITECTURES["bloom-causal_lm"]
    bank = on(arch, "right")
    bank.tokenizer.model_max_length = 30
    assert alone(bank, words(50), "a")["logits"].shape == (30, 64)
    xlnet = on(ARCHITECTURES["xlnet-sequence"], "left")  # says -1: no limit
    assert xlnet.max_length is None
    assert set(alone(xlnet, words(50), "a")["scores"]) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    rotary = on(ARCHITECTURES["qwen2-causal_lm"], "right")
    assert rotary.max_length == 16
    rotary.tokenizer.model_max_length = 20
    assert alone(rotary, words(50), "a")["logits"].shape == (20, 64)


QUESTIONS = "BertForQuestionAnswering-2"


def test_a_question_that_leaves_no_room_for_the_context():
    bank = served()
    fits = (words(LONGEST - 4), words(3))  # and three special tokens: one token of the context is left
    answer = alone(bank, fits, QUESTIONS)
    assert answer["answer"] == fits[1].split()[0]
    for length in (LONGEST - 3, LONGEST, 40):
        with pytest.raises(TaskBankError, match=rf"question of texts\[1\] takes {length} tokens .* {LONGEST} in all"):
            bank.predict([fits, (words(length), "a")], [QUESTIONS] * 2)


@pytest.mark.parametrize("context", ["", "  \n"])
def test_an_empty_context(context):
    with pytest.raises(TaskBankError, match=r"context of texts\[1\] .* is empty"):
        served().predict([("a", "b"), ("a", context)], [QUESTIONS] * 2)
    score = alone(served(), ("", "b c"), QUESTIONS)["score"]
    assert math.isfinite(score)


def test_a_text_without_a_token():
    bank = on(ARCHITECTURES["gpt2-causal_lm"], "right")
    bank.tokenizer._tokenizer.post_processor = None  # like GPT-2's, it adds nothing
    with pytest.raises(TaskBankError, match=r"texts\[1\] .* no tokens"):
        bank.predict(["a", ""], ["a", None])


def test_tasks_that_do_not_take_texts():
    arch = ARCHITECTURES["bert-choice"]
    bank = TaskBank(randomize_(arch.build()), tokenizer())
    with pytest.raises(TaskBankError, match="BertForMultipleChoice, which takes several texts"):
        bank.predict(["a b", "c d e"], [None, None])
    image = TaskBank(randomize_(ARCHITECTURES["vit-image"].build()), tokenizer())
    with pytest.raises(TaskBankError, match="ViTForImageClassification, which takes pixel_values"):
        image.predict(["a"], [None])
