"""The study of one setting for everything: halves of the dev set, differences, times, and runs that collapsed."""

from __future__ import annotations

from pathlib import Path

import pytest
import quick_recipe
import yaml
from reproduction import aggregate, defaults, plan, reproduce, studies
from reproduction.baselines import make_method
from reproduction.markdown import Context
from reproduction.store import RunStore

from bitfit_hf import BitFitCallback
from bitfit_hf.trainer.rates import DEFAULT_SCALE

METHODS = {"full": [1e-4, 1e-3], "bitfit": [1e-4, 1e-3], "bitfit_default": [1e-3], "lora": [1e-3]}
# What is reported after each of three epochs, at the higher rate with the first seed.
SCORES = {"full": (0.6, 0.8, 0.9), "bitfit": (0.5, 0.7, 0.8), "bitfit_default": (0.8, 0.86, 0.88), "lora": (0.9,) * 3}


def stored(method: str, rate: float, seed: int) -> dict:
    """A record: on the half that chooses the higher rate is better, on the one that is reported the lower."""
    lower = rate < 1e-3
    reported = [score + 0.01 * seed + (0.05 if lower else 0.0) for score in SCORES[method]]
    history = [
        {
            "epoch": float(epoch),
            "step": 10 * epoch,
            "seconds": 99.0,
            "processor_seconds": 10.0 * epoch,
            "train_loss": 1.0,
            "constant": lower and method == "full",
            "eval": {"accuracy": 0.3 if lower else 0.5, "report_accuracy": score},
        }
        for epoch, score in enumerate(reported, 1)
    ]
    made = quick_recipe.record(rate, seed, method, 0.0)
    return made | {"history": history, "metrics": {"best": history[-1]["eval"], "final": history[-1]["eval"]}}


@pytest.fixture
def study(tmp_path: Path):
    values = {
        "name": "quick",
        "models": {"Tiny": {"model_name_or_path": "tiny"}},
        "methods": {name: {"learning_rates": rates} for name, rates in METHODS.items()},
        "tasks": {
            "quick": {
                "recipe": "quick_recipe",
                "arguments": {"dev_halves": True},
                "columns": {"RTE": "accuracy"},
            }
        },
        "studies": {"defaults": [{"tasks": ["quick"], "methods": list(METHODS), "seeds": [0, 1]}]},
    }
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(values))
    config = studies.read_config(path)
    store = RunStore(tmp_path / "results" / "quick")
    cells = plan.expand(config, ["defaults"])
    for cell in cells:
        for run in [*cell.grid(), cell.run(1e-3, 1)]:
            store.put(run, stored(cell.method.name, run.learning_rate, run.seed), 60.0)
    return path, Context(config, store, str(path)), cells


def test_one_half_chooses_and_the_other_is_reported(study):
    _, context, cells = study
    full = cells[0]
    assert aggregate.settled(full, context.store) == 1e-3
    assert aggregate.summarize(full, context.store).values == (0.9, 0.91)


def test_the_document_compares_the_default_with_the_best_of_each_grid(study):
    path, context, _ = study
    options = ["--study", "defaults", "--config", str(path), "--results_dir", str(context.store.folder.parent)]
    assert reproduce.main([*options, "--render_only"]).done == []
    text = (context.store.folder / "defaults.md").read_text()
    assert "| minus Full-FT | -2.0 ± 0.7 | -2.0 ± 0.7 | 1 |" in text
    assert "| minus BitFit | +8.0 ± 0.7 | +8.0 ± 0.7 | 1 |" in text
    assert "| Tiny | quick | Full-FT | 3 | 0.0001 (seed 0) |" in text
    assert "| Tiny | quick | BitFit by default | 2 |" not in text  # none of its runs has collapsed
    assert "one half of the dev set is for choosing the learning rate and the epoch" in text
    assert (context.store.folder / "defaults.png").read_bytes().startswith(b"\x89PNG")


def test_times_to_a_score(study):
    _, context, cells = study
    curves = {cell.method.name: defaults.curve(cell, context) for cell in cells}
    full = curves["full"]
    assert full.epochs == (1.0, 2.0, 3.0)
    assert full.scores == pytest.approx((0.605, 0.805, 0.905))  # of both seeds
    target = defaults.NEAR * 0.905
    seconds, before = full.seconds_to(target)
    assert seconds == pytest.approx(20 + 10 * (target - 0.805) / 0.1)
    assert not before
    assert curves["lora"].seconds_to(target) == (10.0, True)
    assert curves["bitfit"].seconds_to(target) is None
    assert curves["bitfit_default"].first_epoch(curves["bitfit"].scores[-1]) == 1.0


def test_one_epoch_against_several(study):
    path, context, _ = study
    values = yaml.safe_load(path.read_text())
    for name, epochs in (("quick", 3), ("quick_1", 1)):
        task = {**values["tasks"]["quick"], "arguments": {"dev_halves": True, "epochs": epochs}}
        values["tasks"][name] = task
    values["studies"]["one_epoch"] = [
        {"tasks": ["quick"], "methods": ["bitfit"], "seeds": [0, 1]},
        {"tasks": ["quick_1"], "methods": ["bitfit_default"], "seeds": [0, 1]},
    ]
    path.write_text(yaml.safe_dump(values))
    options = ["--study", "one_epoch", "--config", str(path), "--results_dir", str(context.store.folder.parent)]
    reproduce.main([*options, "--render_only"])
    assert "No run yet." in (context.store.folder / "one_epoch.md").read_text()
    for cell in plan.expand(studies.read_config(path), ["one_epoch"]):
        for run in [*cell.grid(), cell.run(1e-3, 1)]:
            context.store.put(run, stored(cell.method.name, run.learning_rate, run.seed), 60.0)
    reproduce.main([*options, "--render_only"])
    text = (context.store.folder / "one_epoch.md").read_text()
    assert "| Tiny | RTE | 0.0001 | 3 | 85.0 | 1 | 0.001 | 1 | 88.5 | 2 | +3.5 |" in text
    assert "| Tiny | RTE | 0.001 | 3 | 80.5 | 2 | 0.001 | 1 | 88.5 | 2 | +8.0 ± 0.7 |" in text


def test_runs_without_times_have_no_curve(study):
    _, context, cells = study
    record = stored("lora", 1e-3, 0)
    for entry in record["history"]:
        del entry["processor_seconds"]
    for seed in (0, 1):
        context.store.put(cells[-1].run(1e-3, seed), record, 60.0)
    assert defaults.curve(cells[-1], context) is None
    assert b"| Tiny | quick | LoRA | 30 |" not in defaults.render_defaults(cells, context)["defaults.md"]


def test_the_default_is_the_library_s():
    """Nothing is set but the learning rate; the paper's has one rate for all terms and the head, and dropout."""
    (ours,), (papers,) = make_method("bitfit_default").callbacks(), make_method("bitfit").callbacks()
    assert (ours.lr_scale, ours.head_learning_rate, ours.dropout) == ("default", None, False)
    assert (papers.lr_scale, papers.head_learning_rate, papers.dropout) == ("uniform", None, True)
    assert (BitFitCallback().lr_scale, BitFitCallback().dropout) == ("default", False)
    assert DEFAULT_SCALE
    with pytest.raises(ValueError, match="There is no method 'bitfit_default:query'"):
        make_method("bitfit_default:query")
