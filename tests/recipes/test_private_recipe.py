"""The private recipe, its study and its benchmark, on a tiny model and made-up data."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from common.record import RunRecord

create_accountant = pytest.importorskip("opacus.accountants", reason="of the extra `private`").create_accountant
benchmark = importlib.import_module("benchmarks.private")  # it imports Opacus too
TINY = "--max_steps 2 --batch_size 4 --accumulation 2 --accountant rdp --use_cpu --eval_batch_size 4"


@pytest.fixture
def recipe() -> Any:
    return importlib.import_module("private")


@pytest.fixture
def options(study_base: str, study_data: Path) -> list[str]:
    return [*TINY.split(), "--model_name_or_path", study_base, "--data_dir", str(study_data)]


@pytest.mark.slow
def test_words_privately_and_without(recipe: Any, options: list[str], tmp_path: Path) -> None:
    private, plain = tmp_path / "private", tmp_path / "plain"
    words = ["--task", "pos", *options]
    record = recipe.main([*words, "--target_epsilon", "5", "--output_dir", str(private)])
    facts = record.notes["privacy"]
    assert 4.5 < facts["epsilon"] <= 5
    assert (facts["steps"], facts["sample_rate"], facts["delta"]) == (2, 4 / 31, 1 / 310)
    accountant = create_accountant(mechanism="rdp")
    accountant.history = [(facts["noise_multiplier"], 4 / 31, 2)]
    assert facts["epsilon"] == pytest.approx(accountant.get_epsilon(delta=1 / 310), rel=1e-12)
    assert len(record.history) == 1, "evaluated once, at the end"
    run = json.loads((private / "adapter_config.json").read_text())["run"]
    assert run["privacy"] == facts
    assert "train_loss" not in run
    assert RunRecord.read(private / "run.json") == record
    other = recipe.main([*words, "--output_dir", str(plain)])
    assert other.notes == {}
    assert other.trainable == record.trainable


def test_what_it_cannot_is_said(recipe: Any, options: list[str], tmp_path: Path) -> None:
    for wrong, message in (
        (["--task", "wnli"], "choose from"),
        (["--method", "full"], "only bitfit"),
        (["--batch_size", "5"], "cannot be split over 1 processes and 2 parts"),
    ):
        with pytest.raises(SystemExit, match=message):
            recipe.main([*options, *wrong, "--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_the_study_goes_on_where_it_stopped(
    study_base: str, study_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = importlib.import_module("reproduction.private")
    tiny = study.Settings(1e-3, 1e-3, batch_size=4, updates=2, clip=1.0)
    monkeypatch.setattr(study, "PRIVATE", dict.fromkeys(study.PRIVATE, tiny))
    monkeypatch.setattr(study, "PLAIN_BATCH", 4)
    monkeypatch.setattr(study, "EPSILONS", (50.0, None))
    monkeypatch.setattr(study, "SEEDS", (0,))
    ran: list[Any] = []
    original = study.private.run
    monkeypatch.setattr(study.private, "run", lambda args: ran.append(args) or original(args))
    common = ["--data_dir", str(study_data), "--mpnet", study_base, "--results_dir", str(tmp_path), "--parts", "mpnet"]
    study.main([*common, "--max_runs", "1"])
    study.main([*common, "--max_runs", "2"])
    study.main([*common, "--max_runs", "0"])
    assert [(args.task, args.target_epsilon) for args in ran] == [("sst2", 50.0), ("sst2", None), ("pos", 50.0)]
    lines = study.read(tmp_path / "private.jsonl")
    assert [(line["task"], line["epsilon"]) for line in lines] == [("sst2", 50.0), ("sst2", None), ("pos", 50.0)]
    assert lines[0]["notes"]["privacy"]["epsilon"] <= 50
    text = (tmp_path / "private.md").read_text()
    assert "Missing: 5 of 8 runs." in text
    assert text.count("| all-mpnet-base-v2 |") == 3


def test_other_settings_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = importlib.import_module("reproduction.private")
    monkeypatch.setattr(study, "SEEDS", (0,))
    ran: list[Any] = []

    def instead(args: Any) -> RunRecord:
        ran.append(args)
        metrics = {"final": {"accuracy": 0.5 + 0.01 * len(ran), "loss": 0.6}}
        facts = {"epsilon": args.target_epsilon, "noise_multiplier": 0.4} if args.target_epsilon else {}
        notes = {"privacy": facts} if facts else {}
        return RunRecord(
            recipe="private", task=args.task, model="m", method="bitfit", learning_rate=1.0, seed=0, config={},
            history=[], metric="accuracy", metrics=metrics, best_epoch=1.0, trainable={}, bytes=1, seconds=60.0,
            processor_seconds=50.0, data={"rows": {"train": 100}}, notes=notes,
        )  # fmt: skip

    monkeypatch.setattr(study.private, "run", instead)
    command = ["--results_dir", str(tmp_path), "--parts", "minilm"]
    study.main([*command, "--max_runs", "3"])
    study.main([*command, "--max_runs", "0"])
    key = (study.MINILM, "sst2")
    changed = study.replace(study.PRIVATE[key], batch_size=study.PRIVATE[key].batch_size // 2)
    monkeypatch.setattr(study, "PRIVATE", study.PRIVATE | {key: changed})
    study.main([*command, "--max_runs", "3"])
    assert [args.batch_size for args in ran[3:5]] == [changed.batch_size] * 2
    assert [(args.target_epsilon, args.batch_size) for args in ran[2:6:3]] == [(None, 32), (None, 32)]
    assert {(args.max_steps or 0) * args.batch_size for args in ran[3:6]} == {changed.updates * changed.batch_size}
    lines = study.read(tmp_path / "private.jsonl")
    assert len(lines) == len({study.run_of(line) for line in lines}) == 6, "the runs of the old settings are kept"
    shown, others = (tmp_path / "private.md").read_text().split("Runs with other settings")
    assert "| 1 | 0.540 |" in shown
    assert "| 0.510 |" not in shown, "runs of two settings are not shown as one"
    assert "| 0 | 0.510 |" in others


def test_the_recorded_lines_are_runs_of_today() -> None:
    study = importlib.import_module("reproduction.private")
    lines = study.read(study.RESULTS / "private.jsonl")
    assert len({study.run_of(line) for line in lines}) == len(lines) > 0
    assert study.page(lines) == (study.RESULTS / "private.md").read_text()


@pytest.mark.slow
def test_the_benchmark_compares_equals(tmp_path: Path) -> None:
    place = ["--results_dir", str(tmp_path)]
    benchmark.main(["--tiny", "--shapes", "minilm", "--rounds", "3", "--warmup", "1", "--device", "cpu", *place])
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("private-*.json")]
    rows = {row["system"]: row for row in result["rows"]}
    assert list(rows) == [benchmark.PLAIN, benchmark.PRIVATE, benchmark.OPACUS]
    private, opacus = rows[benchmark.PRIVATE], rows[benchmark.OPACUS]
    assert private["epsilon"] == pytest.approx(opacus["epsilon"], rel=1e-9)
    assert private["epsilon"] == pytest.approx(benchmark.EPSILON, abs=0.02)
    assert private["kept_ratio"] < 1.1 < opacus["kept_ratio"]
    assert all(len(row["all_seconds"]) == 3 for row in rows.values())
    before = (tmp_path / "private.md").read_text()
    assert "| BitFit, private |" in before
    benchmark.main(["--render_only", *place])
    assert (tmp_path / "private.md").read_text() == before
