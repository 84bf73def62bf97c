"""What users say for a model card: through the callback, through a push, and what they have written on it since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES, randomize_
from huggingface_hub import ModelCard
from peft import get_peft_model
from tuner_tester import fill_

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig, ConfigError, push_to_hub
from bitfit_hf.card.model_card import write_card
from bitfit_hf.training_run import TrainingRun

FACTS = {"license": "mit", "language": ["en", "de"], "widget": [{"text": "A fine film."}], "dataset": "user/reviews"}


@pytest.fixture(scope="module")
def delta() -> BiasDelta:
    model = randomize_(ARCHITECTURES["bert-sequence"].build())
    return BiasDelta.from_model(fill_(get_peft_model(model, BitFitConfig()), seed=1))


def saved(delta: BiasDelta, folder: Path) -> Path:
    delta.save_pretrained(folder)
    return folder


def header(folder: Path) -> dict[str, Any]:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_facts_of_a_run_are_on_the_card_and_stay_there(delta: BiasDelta, tmp_path: Path) -> None:
    run = TrainingRun(metrics={"accuracy": 0.75})
    run.card = dict(FACTS)
    folder = saved(delta, tmp_path / "d")
    (folder / "README.md").unlink()
    write_card(folder, run=run, delta=delta)
    found = header(folder)
    assert {name: found[name] for name in ("license", "language", "widget")} == {
        name: FACTS[name] for name in ("license", "language", "widget")
    }
    assert found["datasets"] == ["user/reviews"]
    assert found["model-index"][0]["results"][0]["dataset"]["type"] == "user/reviews"
    # Another process, which knows nothing of them, saves again.
    write_card(folder, delta=delta)
    assert header(folder)["license"] == "mit"
    # And a person has changed one since.
    card = ModelCard.load(folder / "README.md")
    card.data.license = "apache-2.0"
    card.save(folder / "README.md")
    write_card(folder, run=run, delta=delta)
    assert (header(folder)["license"], header(folder)["language"]) == ("apache-2.0", ["en", "de"])


def test_facts_of_a_push_win(delta: BiasDelta, tmp_path: Path, hub: Any, hub_env: Any) -> None:
    folder = saved(delta, tmp_path / "d")
    write_card(folder, license="mit")
    push_to_hub(folder, "alice/task", base_model="user/base", card={"license": "apache-2.0", "language": "en"})
    card = ModelCard.load("alice/task").data
    assert (card.license, card.language) == ("apache-2.0", "en")
    assert header(folder)["license"] == "mit"


@pytest.mark.parametrize(
    ("card", "match"),
    [
        ({"licence": "mit"}, "'licence' is none of license, language"),
        ({"license": 3}, r"'license' is 3 \(int\)"),
        ("mit", "must be a mapping"),
    ],
)
def test_facts_that_no_card_can_show(card: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        BitFitCallback(card=card)


def test_the_raw_file_begins_with_what_people_read(delta: BiasDelta, tmp_path: Path) -> None:
    text = ModelCard.load(saved(delta, tmp_path / "d") / "README.md").text.strip()
    lines = text.splitlines()
    assert lines[:2] == ["<!-- bitfit_hf:about -->", lines[1]]
    assert lines[1].startswith("# ")
    assert lines[-1] == "<!-- /bitfit_hf:note -->"
    assert "generated:" in lines[-2]


def test_a_local_base_has_the_snippet_of_transformers_too(delta: BiasDelta, tmp_path: Path) -> None:
    text = (saved(delta, tmp_path / "d") / "README.md").read_text()
    assert "of a base model without a name on the Hub" in text
    assert 'AutoModelForSequenceClassification.from_pretrained("path/to/this/folder")' in text
