"""Label names and problem type are read when a delta is saved, not when its adapter was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from trainer_tester import WAYS, fresh, prepared, rows, trainer_for
from transformers import AutoModelForSequenceClassification

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig
from bitfit_hf.errors import ConfigError

MULTI, SINGLE = "multi_label_classification", "single_label_classification"
NAMES = {0: "bad", 1: "fair", 2: "good"}

# Every way in which a delta gets from a live model into a folder.
SAVES: dict[str, Callable[[Any, Any, Path], Any]] = {
    "save_pretrained": lambda trainer, model, folder: model.save_pretrained(folder),
    "save_model": lambda trainer, model, folder: trainer.save_model(str(folder)),
    "BiasDelta": lambda trainer, model, folder: BiasDelta.from_model(model).save_pretrained(folder),
    "checkpoint": lambda trainer, model, folder: Path(trainer.args.output_dir, "checkpoint-4").rename(folder),
}


def float_rows(labels: int = 3) -> list[dict[str, torch.Tensor]]:
    """Several labels at once for each example, as numbers, from which transformers infers the problem type."""
    return [
        {**row, "labels": torch.tensor([float(i >> bit & 1) for bit in range(labels)])}
        for i, row in enumerate(rows(8))
    ]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("way", WAYS)
def test_the_problem_type_that_the_first_batch_settles(way: str, save: str, tmp_path: Path) -> None:
    for problem, train in ((MULTI, float_rows()), (SINGLE, rows(8))):
        folder = tmp_path / problem
        model = prepared(way)
        assert model.config.problem_type is None
        trainer = trainer_for(model, tmp_path / "run" / problem, train=train, save_steps=4)
        trainer.train()
        SAVES[save](trainer, model, folder)
        assert config_of(folder)["problem_type"] == problem


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("way", WAYS)
def test_names_given_after_the_trainer_was_made(way: str, save: str, tmp_path: Path) -> None:
    model = prepared(way)
    trainer = trainer_for(model, tmp_path / "run", save_steps=4)
    model.config.id2label = dict(NAMES)
    trainer.train()
    SAVES[save](trainer, model, tmp_path / "delta")
    assert config_of(tmp_path / "delta")["id2label"] == {str(index): name for index, name in NAMES.items()}
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "good" in card

    fresh().save_pretrained(tmp_path / "base")
    load = AutoModelForSequenceClassification.from_pretrained
    loaded = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "delta")
    assert loaded.config.id2label == NAMES


def test_each_adapter_keeps_its_own(tmp_path: Path) -> None:
    """What changes while an adapter is the active one is its own, and another starts from the base's problem type."""
    model = fresh()
    first = trainer_for(model, tmp_path, BitFitCallback(adapter_name="several"), train=float_rows())
    first.train()
    model.config.id2label = dict(NAMES)

    config = BitFitConfig(num_labels=2, id2label={0: "no", 1: "yes"})
    train = [{**row, "labels": row["labels"] % 2} for row in rows(8)]
    second = trainer_for(model, tmp_path, BitFitCallback(config, adapter_name="one"), train=train)
    assert model.config.problem_type is None
    second.train()
    assert model.config.problem_type == SINGLE
    number = BitFitCallback(BitFitConfig(num_labels=1), adapter_name="number")
    third = trainer_for(model, tmp_path, number, train=[{**row, "labels": row["labels"].float()} for row in rows(8)])
    third.train()

    expected = {
        "several": (MULTI, NAMES),
        "one": (SINGLE, {0: "no", 1: "yes"}),
        "number": ("regression", {0: "LABEL_0"}),
    }
    for name, trainer in zip(expected, (first, second, third), strict=True):
        trainer.save_model(str(tmp_path / name))
        values = config_of(tmp_path / name)
        found = (values["problem_type"], {int(index): label for index, label in values["id2label"].items()})
        assert found == expected[name]
        delta = BiasDelta.from_model(model, name)
        assert (delta.config.problem_type, delta.config.id2label) == expected[name]
    for name in expected:
        model.set_adapter(name)
        assert (model.config.problem_type, model.config.id2label) == expected[name]


def test_the_bases_own_labels_come_back(tmp_path: Path) -> None:
    model = fresh()
    own = dict(model.config.id2label)
    trainer = trainer_for(model, tmp_path, train=float_rows())
    model.config.id2label = dict(NAMES)
    trainer.train()
    model.disable_adapters()
    assert (model.config.id2label, model.config.problem_type) == (own, None)
    model.enable_adapters()
    assert (model.config.id2label, model.config.problem_type) == (NAMES, MULTI)
    model.delete_adapter("default")
    assert (model.config.id2label, model.config.problem_type) == (own, None)
    model.add_adapter(BitFitConfig())
    assert (model.config.id2label, model.config.problem_type) == (own, None)


@pytest.mark.parametrize("way", WAYS)
def test_a_problem_type_that_the_user_gives(way: str, tmp_path: Path) -> None:
    config = BitFitConfig(problem_type=MULTI)
    model = prepared(way, config)
    trainer_for(model, tmp_path, BitFitCallback(config), train=float_rows())
    assert model.config.problem_type == MULTI
    assert BiasDelta.from_model(model).config.problem_type == MULTI


def test_a_weighted_adapter_has_the_first_ones_labels(tmp_path: Path) -> None:
    model = get_peft_model(fresh(), BitFitConfig())
    model.add_adapter("second", BitFitConfig())
    model.config.id2label = dict(NAMES)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert BiasDelta.from_model(model, "both").config.id2label == NAMES


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("id2label", {0: "no", 1: "yes"}, r"names 2 labels, and the head of adapter 'default' has 3 outputs"),
        ("id2label", {1: "bad", 2: "fair", 3: "good"}, r"name each of 0 to 2 once"),
        ("id2label", {0: 0, 1: 1, 2: 2}, r"`id2label` must be a mapping of label numbers to names"),
        ("problem_type", "ranking", r"`problem_type` must be one of regression"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_labels_that_could_not_be_loaded_are_not_saved(
    way: str, attribute: str, value: Any, message: str, tmp_path: Path
) -> None:
    model = prepared(way)
    trainer_for(model, tmp_path / "run")
    try:
        setattr(model.config, attribute, value)
    except StrictDataclassError:
        pytest.skip(
            f"transformers {transformers.__version__} refuses {attribute}={value!r} itself, before it is saved"
        )
    for save in (lambda: model.save_pretrained(tmp_path / "delta"), lambda: BiasDelta.from_model(model)):
        with pytest.raises(ConfigError, match=message):
            save()
    assert not (tmp_path / "delta" / "adapter_model.safetensors").exists()


def test_names_with_numbers_as_text(tmp_path: Path) -> None:
    # As JSON has them; transformers takes them like that too.
    model = fresh()
    trainer_for(model, tmp_path / "run")
    model.config.id2label = {str(index): name for index, name in NAMES.items()}
    assert BiasDelta.from_model(model).config.id2label == NAMES
