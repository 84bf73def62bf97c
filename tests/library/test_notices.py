"""What a user sees without having set up any logging."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_tester import fresh, rows, trainer_for
from transformers import AutoModelForSequenceClassification, TrainerCallback
from transformers.utils import logging as transformers_logging

from bitfit_hf import bias_change
from bitfit_hf.notices import notice
from bitfit_hf.trainer.term_changes import PREFIX

LINE = "BitFit trains "


@pytest.fixture
def verbosity():
    """transformers' verbosity, put back afterwards."""
    before = transformers_logging.get_verbosity()
    yield transformers_logging.set_verbosity
    transformers_logging.set_verbosity(before)


@pytest.mark.parametrize(("level", "seen"), [(logging.WARNING, True), (logging.ERROR, False)])
def test_the_line_at_the_start_is_seen(level: int, seen: bool, verbosity, tmp_path: Path, capsys):
    verbosity(level)
    trainer_for(fresh(), tmp_path).train()
    captured = capsys.readouterr()
    assert captured.err.count(LINE) == int(seen)
    assert LINE not in captured.out


def test_who_listens_is_told_once(caplog, capsys):
    logger = logging.getLogger("bitfit_hf.somewhere")
    with caplog.at_level(logging.INFO, logger="bitfit_hf"):
        notice(logger, "100 % done")
    assert caplog.messages == ["100 % done"]
    assert not capsys.readouterr().err


def test_the_loading_report_is_put_right(tmp_path: Path, capsys):
    """transformers reports the head as missing when it reads the base, before it comes to the delta."""
    base = tmp_path / "base"
    model = fresh()
    model.base_model.save_pretrained(base)
    model.config.save_pretrained(base)
    trained = AutoModelForSequenceClassification.from_pretrained(base)
    trainer = trainer_for(trained, tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "delta"))
    capsys.readouterr()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "delta")
    err = capsys.readouterr().err
    assert err.count("The delta has brought its head") == 1
    assert "classifier" in err
    head = trained.classifier.modules_to_save["default"].weight
    assert torch.equal(loaded.classifier.modules_to_save["default"].weight, head)


class _Tracker(TrainerCallback):
    """Stands where TensorBoard's callback does, before those that a user passes."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_trackers_see_how_far_each_term_has_moved(tmp_path: Path):
    model = fresh("gpt2-sequence")  # with a fused projection, of which each term is a slice
    trainer = trainer_for(model, tmp_path, train=rows(8, "gpt2-sequence"), max_steps=2)
    tracker, console = _Tracker(), _Tracker()
    trainer.callback_handler.callbacks.insert(0, tracker)
    trainer.add_callback(console)
    trainer.train()
    logged = [entry for entry in tracker.seen if "loss" in entry]
    assert len(logged) == 2
    sums: dict[str, list[float]] = {}
    for row in bias_change(model):
        total, size = sums.get(row.term, (0.0, 0))
        sums[row.term] = [total + row.value * row.size, size + row.size]
    figures = {name: value for name, value in logged[-1].items() if name.startswith(PREFIX)}
    assert figures == {PREFIX + term: pytest.approx(total / size, rel=1e-5) for term, (total, size) in sums.items()}
    assert len(figures) >= 6
    assert all(value > 0 for name, value in figures.items() if "key" not in name)
    assert logged[0][PREFIX + "query"] != logged[1][PREFIX + "query"]
    assert trainer.state.log_history[-2][PREFIX + "query"] == figures[PREFIX + "query"]
    assert not [name for entry in console.seen for name in entry if name.startswith(PREFIX)]
