"""A run that has failed says so, once, with what to change; what is not finite gets into no file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from trainer_tester import arguments, fresh, trainer_for
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, Trainer
from tuner_tester import fill_

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig, BitFitError, NonFiniteDeltaError
from bitfit_hf.trainer.failure import Predictions

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


@pytest.fixture
def warned(caplog):
    """The warnings of the watch so far."""
    caplog.set_level(logging.WARNING, logger="bitfit_hf")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "bitfit_hf.trainer.failure"]


def data(number: int = 24, labels: int = 2, tokens: bool = False) -> list[dict]:
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (number, 6))
    return [
        {"input_ids": row, "labels": torch.arange(6) % labels if tokens else i % labels} for i, row in enumerate(ids)
    ]


def make(tmp_path: Path, model=None, *, train=None, evaluate=None, **values) -> Trainer:
    torch.manual_seed(0)
    model = model if model is not None else BertForSequenceClassification(BertConfig(**SIZES))
    args = arguments(tmp_path, **{"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, **values})
    return Trainer(
        model, args, train_dataset=train or data(), eval_dataset=evaluate or data(), callbacks=[BitFitCallback()]
    )


def collapse_(trainer: Trainer) -> None:
    """Makes the trained head answer with one label, whatever comes in."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "classifier.modules_to_save" in name and name.endswith("bias"):
                parameter.zero_()[0] = 100.0


# --- constant predictions ---


@pytest.mark.parametrize("tokens", [False, True], ids=["sequences", "tokens"])
def test_constant_predictions_are_told_once(tmp_path, warned, tokens):
    cls = BertForTokenClassification if tokens else BertForSequenceClassification
    torch.manual_seed(0)
    trainer = make(tmp_path, cls(BertConfig(**SIZES)), train=data(tokens=tokens), evaluate=data(tokens=tokens))
    trainer.train()
    assert not [text for text in warned() if "constant" in text]
    collapse_(trainer)
    trainer.evaluate()
    trainer.evaluate()
    (text,) = warned()
    assert "predictions are constant (label 0 always, over 24 examples" in text
    assert "Lower the learning rate" in text


class OtherForSequenceClassification(BertForSequenceClassification):
    """Takes its labels by another name."""

    def forward(self, input_ids=None, attention_mask=None, gold_label=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=gold_label)


def test_labels_of_another_name_are_found(tmp_path, warned):
    torch.manual_seed(0)
    rows = [{"input_ids": row["input_ids"], "gold_label": row["labels"]} for row in data()]
    trainer = make(tmp_path, OtherForSequenceClassification(BertConfig(**SIZES)), train=rows, evaluate=rows)
    trainer.train()
    collapse_(trainer)
    trainer.evaluate()
    (text,) = warned()
    assert "label 0 always, over 24 examples" in text


def test_a_compiled_model_s_predictions_are_looked_at_where_the_trainer_keeps_them(tmp_path, warned):
    trainer = make(tmp_path)
    trainer.train()
    collapse_(trainer)
    trainer.args.torch_compile = True  # of which the callback knows by this alone
    trainer.evaluate()
    assert not warned()  # without metrics a Trainer throws the logits away
    trainer.compute_metrics = lambda prediction: {}
    trainer.evaluate()
    (text,) = warned()
    assert "label 0 always, over 24 examples" in text


def test_predictions_that_somebody_asked_for_are_no_part_of_an_evaluation(tmp_path, warned):
    trainer = make(tmp_path)
    trainer.train()
    trainer.predict(data())  # of both labels
    collapse_(trainer)
    trainer.evaluate()
    assert len(warned()) == 1


def test_regression_to_one_number_is_constant(tmp_path, warned):
    config = BertConfig(**SIZES, num_labels=1, problem_type="regression")
    rows = [{**row, "labels": float(i % 5)} for i, row in enumerate(data())]
    trainer = make(tmp_path, BertForSequenceClassification(config), train=rows, evaluate=rows)
    trainer.train()
    collapse_(trainer)
    trainer.evaluate()
    assert [text for text in warned() if "constant (" in text and "for every example" in text]


@pytest.mark.parametrize(
    "evaluate", [data(8), [{**row, "labels": 0} for row in data()]], ids=["few examples", "one right answer"]
)
def test_constant_predictions_that_mean_nothing_are_not_told(tmp_path, warned, evaluate):
    trainer = make(tmp_path, evaluate=evaluate)
    trainer.train()
    collapse_(trainer)
    trainer.evaluate()
    assert warned() == []


def test_an_evaluation_before_any_training_is_not_told(tmp_path, warned):
    trainer = make(tmp_path)
    collapse_(trainer)
    trainer.evaluate()
    assert warned() == []


def test_a_hook_is_left_nowhere_and_outputs_are_the_trainer_s(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    logits = trainer.predict(data()).predictions
    assert not trainer.model._forward_hooks
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(input_ids=torch.stack([row["input_ids"] for row in data()])).logits
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-5)


def test_answers_where_there_is_no_label_do_not_count():
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).repeat(20, 1, 1)
    labels = torch.tensor([[0, -100]] * 10 + [[1, -100]] * 10)
    seen = Predictions()
    seen.add(logits, labels, problem_type=None)
    assert seen.failed()
    seen = Predictions()
    seen.add(logits, labels.abs() % 2, problem_type=None)
    assert not seen.failed()


def test_several_labels_at_once():
    seen = Predictions()
    labels = torch.tensor([[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 10)
    seen.add(torch.tensor([[3.0, 1.0]] * 20), labels, problem_type="multi_label_classification")
    assert seen.failed()
    assert seen.told() == "the same for every example"
    seen.add(torch.tensor([[3.0, -1.0]]), labels[:1], problem_type="multi_label_classification")
    assert not seen.failed()


# --- numbers that are none ---


def test_a_loss_that_is_not_finite_is_told_once(tmp_path, warned):
    model = BertForSequenceClassification(BertConfig(**SIZES))
    trainer = make(tmp_path, model, max_steps=4, save_strategy="no")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier.modules_to_save" in name:
                parameter.fill_(float("nan"))
    trainer.train()
    (text,) = warned()
    assert "NaN or Inf" in text or "not a finite number" in text
    assert "Lower the learning rate" in text


@pytest.mark.parametrize("way", ["wrapped", "in place", "value", "checkpoint"])
def test_what_is_not_finite_gets_into_no_file(tmp_path, way):
    good, bad = tmp_path / "good", float("nan")
    model = fill_(get_peft_model(fresh_base(), BitFitConfig()))
    model.save_pretrained(good)

    def files() -> dict[str, bytes]:
        # PEFT renews the card before it asks for the tensors.
        return {path.name: path.read_bytes() for path in good.iterdir() if path.suffix != ".md"}

    before = files()
    if way == "in place":
        model = fresh_base()
        model.add_adapter(BitFitConfig())
    if way == "checkpoint":
        trainer = trainer_for(fresh(), tmp_path / "run", max_steps=1)
        trainer.train()
        model = trainer.model
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "query.bitfit_bias" in n)[0] = bad
    save = {
        "wrapped": lambda: model.save_pretrained(good),
        "in place": lambda: model.save_pretrained(good),
        "value": lambda: BiasDelta.from_model(model).save_pretrained(good),
        "checkpoint": lambda: trainer.save_model(str(good)),
    }[way]
    with pytest.raises(BitFitError if way == "value" else NonFiniteDeltaError, match="NaN or Inf"):
        save()
    assert len(before) == 2
    assert files() == before


def fresh_base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES))


# --- deltas that stand still ---


def test_deltas_that_have_not_moved_are_told(tmp_path, warned):
    make(tmp_path, learning_rate=1e-10).train()
    assert [text for text in warned() if "no delta has moved" in text and "1e-4 to 1e-3" in text]


def test_a_run_that_went_well_is_told_nothing(tmp_path, warned):
    make(tmp_path, max_steps=3).train()
    assert warned() == []
