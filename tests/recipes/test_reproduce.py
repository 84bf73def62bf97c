"""reproduce.py: plans, sweeps that are cut short or shared, choice and averages, tables and claims."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quick_recipe
import yaml
from common.arguments import parse
from launching import HELPERS, launch_two
from reproduction import aggregate, claims, cost, figures, paper, plan, reproduce, runner, studies
from reproduction.markdown import Context
from reproduction.store import DamagedRunError, RunStore
from transformers import HfArgumentParser

from bitfit_hf.analysis import BiasChangeRow

ROOT = Path(reproduce.__file__).resolve().parents[2]
RATES = sorted(quick_recipe.SCORES)
CONFIGS = sorted(path.stem for path in reproduce.CONFIGS.glob("*.yaml"))
MARK = paper.MARK


def study_values(**changes: Any) -> dict[str, Any]:
    """A study of the quick recipe: two methods, three rates, three seeds."""
    rates = {"learning_rates": [f"{rate:g}" for rate in RATES]}
    return {
        "name": "quick",
        "about": "Quick runs.",
        "models": {"Tiny": {"model_name_or_path": "tiny", "paper": "BERT-base"}},
        "arguments": {"epochs": 2},
        "methods": {name: dict(rates) for name in ("full", "bitfit", "frozen", "rand_uniform")},
        "tasks": {
            "quick": {
                "recipe": "quick_recipe",
                "arguments": {"name": "quick"},
                "columns": {"RTE": "accuracy"},
                "rows": 100,
                "tokens": 10.0,
            }
        },
        "studies": {"table3": [{"tasks": ["quick"], "methods": ["full", "frozen"], "seeds": [0, 1, 2]}]},
    } | changes


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Writes study configs, reads them, and keeps the log of the quick recipe."""
    monkeypatch.setenv("QUICK_LOG", str(tmp_path / "log"))

    class Quick:
        log = tmp_path / "log"
        results = tmp_path / "results"
        folder = results / "quick"
        path = tmp_path / "quick.yaml"

        def config(self, **changes: Any) -> studies.StudyConfig:
            self.path.write_text(yaml.safe_dump(study_values(**changes)))
            return studies.read_config(self.path)

        def argv(self, *options: str) -> list[str]:
            if not self.path.exists():
                self.config()
            return ["--table", "3", "--config", str(self.path), "--results_dir", str(self.results), *options]

        def began(self) -> list[str]:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            return [line.split()[1] for line in lines if line.startswith("begin")]

        def start(self, *options: str) -> subprocess.Popen[str]:
            """A sweep in a process of its own."""
            script = str(Path(reproduce.__file__))
            path = os.pathsep.join([str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")])
            return subprocess.Popen(
                [sys.executable, script, *self.argv(*options)],
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    return Quick()


def fill(store: RunStore, cell: plan.Cell, values: dict[tuple[float, int], float | None], **more: Any) -> None:
    """Stores runs with given scores by learning rate and seed."""
    for (rate, seed), value in values.items():
        made = quick_recipe.record(rate, seed, cell.method.name, 0.0 if value is None else value, **more)
        if value is None:
            made["metrics"]["best"]["accuracy"] = made["metrics"]["final"]["accuracy"] = None
        store.put(cell.run(rate, seed), made, 60.0)


def fill_all(config: studies.StudyConfig, store: RunStore) -> None:
    """Stores every run that a complete sweep would do."""
    for cell in plan.expand(config, config.studies):
        seeds = {(rate, 0): quick_recipe.score(rate, 0, cell.method.name) for rate in cell.learning_rates}
        best = max(seeds, key=seeds.__getitem__)[0]
        more = {(best, seed): quick_recipe.score(best, seed, cell.method.name) for seed in cell.seeds}
        fill(store, cell, seeds | more)


# --- the plan ---


def test_the_id_of_a_run_is_stable_and_is_of_all_that_it_depends_on(quick):
    (cell, _) = plan.expand(quick.config(), ["table3"])
    run = cell.run(1e-3, 1)
    assert run.id == "quick-Tiny-full-lr0.001-seed1-408a645e"  # results that are kept are found by it
    others = [cell.run(1e-4, 1), cell.run(1e-3, 2)]
    others += [
        plan.expand(quick.config(**changes), ["table3"])[0].run(1e-3, 1)
        for changes in (
            {"arguments": {"epochs": 3}},
            {"methods": {name: {"learning_rates": [1e-3], "arguments": {"x": 1}} for name in ("full", "frozen")}},
            {"models": {"Tiny": {"model_name_or_path": "another"}}},
        )
    ]
    assert len({run.id, *(other.id for other in others)}) == len(others) + 1
    for changes in ({"about": "Else."}, {"seeds_at_best": False}, {"ms_per_token": {"default": 9}}):
        assert plan.expand(quick.config(**changes), ["table3"])[0].run(1e-3, 1).id == run.id


def test_a_run_by_other_rules_is_another_run(quick, monkeypatch):
    """Results of before are not taken for those of today, whatever the study config says."""
    (cell, _) = plan.expand(quick.config(), ["table3"])
    store = RunStore(quick.folder)
    fill(store, cell, {(1e-3, 0): 0.7})
    assert store.get(cell.run(1e-3, 0)) is not None
    monkeypatch.setattr(plan, "RULES", plan.RULES + 1)
    assert store.get(cell.run(1e-3, 0)) is None


def test_studies_share_runs_and_a_cell_is_the_union_of_its_parts(quick):
    config = quick.config(
        studies={
            "table1": [{"tasks": ["quick"], "methods": ["full"], "learning_rates": {"full": [1e-4]}}],
            "table3": [
                {"tasks": ["quick"], "methods": ["full"], "learning_rates": {"full": [1e-3]}},
                {"tasks": ["quick"], "methods": ["full", "frozen"], "seeds": [0, 7]},
            ],
        }
    )
    alone = plan.expand(config, ["table1"])
    assert [(cell.learning_rates, list(cell.seeds)) for cell in alone] == [((1e-4,), [0])]
    both = plan.expand(config, ["table1", "table3"])
    assert [(cell.method.name, cell.learning_rates, cell.seeds) for cell in both] == [
        ("full", tuple(RATES), {0: 0, 7: 2}),
        ("frozen", tuple(RATES), {0: 2, 7: 2}),
    ]
    assert alone[0].grid()[0].id in {run.id for run in both[0].grid()}


def test_a_task_may_have_a_smaller_grid_and_a_part_another(quick):
    tasks = {"quick": {**study_values()["tasks"]["quick"], "learning_rates": {"full": [1e-2, "1e-4"]}}}
    part = {"tasks": ["quick"], "methods": ["full", "frozen"]}
    config = quick.config(
        tasks=tasks, studies={"table1": [part], "table3": [{**part, "learning_rates": {"full": [1e-3]}}]}
    )
    grids = [[cell.learning_rates for cell in plan.expand(config, [study])] for study in ("table1", "table3")]
    assert grids == [[(1e-4, 1e-2), tuple(RATES)], [(1e-3,), tuple(RATES)]]


def test_a_plan_is_complete(quick):
    (full, frozen) = plan.expand(quick.config(), ["table3"])
    assert full.size + frozen.size == 2 * (3 + 2)
    assert [(run.learning_rate, run.seed) for run in full.grid()] == [(1e-3, 0), (1e-4, 0), (1e-2, 0)]
    assert (len(full.wanted(None)), full.waiting(None)) == (3, 2)
    assert {(run.learning_rate, run.seed) for run in full.wanted(1e-2)} == {
        (1e-4, 0),
        (1e-3, 0),
        (1e-2, 0),
        (1e-2, 1),
        (1e-2, 2),
    }
    (full, _) = plan.expand(quick.config(seeds_at_best=False), ["table3"])
    assert (full.size, full.waiting(None)) == (9, 0)
    assert {(run.learning_rate, run.seed) for run in full.wanted(None)} == {(r, s) for r in RATES for s in range(3)}


def test_every_cell_is_done_once_before_the_grids_and_the_seeds_come_last(quick):
    config = quick.config()
    done: list[tuple[str, float, int]] = []

    def execute(run: plan.Run, folder: Path) -> runner.Outcome:
        done.append((run.method.name, run.learning_rate, run.seed))
        value = quick_recipe.score(run.learning_rate, run.seed, run.method.name)
        return runner.Outcome(quick_recipe.record(run.learning_rate, run.seed, run.method.name, value))

    cells, store = plan.expand(config, ["table3"]), RunStore(quick.folder)
    runner.run_missing(cells, store, execute, cost.CostModel(config, store, cells))
    rates = [1e-3, 1e-4, 1e-2]
    assert done == [
        *((method, rate, 0) for rate in rates for method in ("full", "frozen")),
        *((method, 1e-3, seed) for seed in (1, 2) for method in ("full", "frozen")),
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_study_config(name, tmp_path, capsys):
    """Its plan for every study, and that each run's arguments are options of its recipe."""
    config = studies.read_config(reproduce.config_path(name))
    assert config.name == name
    assert set(config.studies) <= set(studies.STUDIES)
    assert len(config.studies) >= (4 if name == "mpnet_cpu" else 7)
    for study in config.studies:
        kind = re.match("table|figure", study)
        option = [f"--{kind[0]}", study[-1]] if kind else ["--study", study]
        done = reproduce.main([*option, "--config", name, "--dry_run", "--results_dir", str(tmp_path)])
        assert done.done == []
        wanted = sum(cell.size for cell in plan.expand(config, [study]))
        assert f"0 of {wanted} runs are there" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())
    seen = {}
    for cell in plan.expand(config, config.studies):
        seen[cell.task.name, cell.method.name] = cell.grid()[0]
        if cell.task.paper:
            assert set(cell.task.columns) <= set(paper.COLUMNS)
    assert len(seen) > 20
    for run in seen.values():
        module = importlib.import_module(run.task.recipe)
        (kind,) = [
            value
            for key, value in vars(module).items()
            if key.endswith("Arguments") and getattr(value, "__module__", None) == run.task.recipe
        ]
        parsed = parse(kind, runner.command_line(run, runner.Places(), "out"))
        assert (parsed.method, parsed.learning_rate, parsed.seed) == (run.method.name, run.learning_rate, run.seed)
        assert parsed.model_name_or_path == run.model.model_name_or_path
        from reproduction.baselines import make_method

        assert make_method(parsed.method, **parsed.options_of_method())


def test_there_are_three_study_configs():
    assert CONFIGS == ["minilm_cpu", "mpnet_cpu", "paper"]


def test_every_command_in_the_header_plans(tmp_path, capsys):
    lines = re.findall(
        r"^    (?:python|accelerate launch) recipes/reproduction/reproduce.py (.*)$", reproduce.__doc__, re.MULTILINE
    )
    assert len(lines) == 7
    for line in lines:
        reproduce.main([*shlex.split(line), "--dry_run", "--results_dir", str(tmp_path)])
        assert "Missing: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studies": {"table3": [{"tasks": ["nope"], "methods": ["full"]}]}}, "task nope is not defined"),
        ({"studies": {"table9": []}}, "unknown study table9"),
        ({"score": "middle"}, "score 'middle'"),
        ({"name": "../up"}, "becomes a folder"),
        ({"methods": {"full": {"learning_rate": [1]}}}, "method full: unknown fields learning_rate"),
        ({"epochs": 3}, "unknown fields epochs"),
        ({"methods": {"full": {"learning_rates": ["fast"]}}}, "wrong form"),
        ({"tasks": {"quick": {"columns": {}}}}, "wrong form"),
        (
            {"tasks": {"quick": {"recipe": "r", "columns": {"A": "a"}, "learning_rates": {"nope": [1]}}}},
            "task quick: learning rates of nope",
        ),
    ],
)
def test_a_study_config_that_cannot_be(quick, changes, message):
    with pytest.raises(studies.StudyError, match=message) as error:
        quick.config(**changes)
    assert str(quick.path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "cola"], "--tasks cola: not in this study, which has quick"),
        (["--learning_rates", "5"], "--learning_rates 5.0"),
        (["--shard", "2/2"], "--shard 2/2"),
        (["--order", "random"], "--order random"),
        (["--model_path", "Tiny"], "NAME=FOLDER"),
        (["--figure", "1"], "has no 'figure1'"),
        (["--config", "nowhere.yaml"], "cannot be read"),
        (["--config", "nowhere"], "--config nowhere: there is minilm_cpu, mpnet_cpu, paper; or give a YAML file"),
    ],
)
def test_options_that_cannot_be(quick, options, message):
    with pytest.raises(SystemExit, match=message):
        reproduce.main([*quick.argv(), *options])
    assert not quick.began()


# --- sweeps ---


def test_a_sweep_does_everything_once_and_a_second_one_nothing(quick, capsys):
    sweep = reproduce.main(quick.argv())
    assert len(sweep.done) == len(set(sweep.done)) == 10
    assert sorted(quick.began()) == sorted(
        f"quick/{method}/{rate:g}/{seed}"
        for method in ("full", "frozen")
        for rate, seed in [*((rate, 0) for rate in RATES), (1e-3, 1), (1e-3, 2)]
    )
    assert {path.stem for path in (quick.folder / "runs").iterdir()} == set(sweep.done)
    assert not [path for path in (quick.folder / ".work").iterdir() if path.is_dir()]
    assert "10 runs done" in capsys.readouterr().out
    assert reproduce.main(quick.argv()).done == []
    assert len(quick.began()) == 10


def test_a_whole_table_is_rendered_from_stored_runs_without_a_new_run(quick, monkeypatch):
    fill_all(quick.config(), RunStore(quick.folder))
    monkeypatch.setattr(runner.RecipeRunner, "__call__", lambda *_: pytest.fail("a run was started"))
    assert reproduce.main(quick.argv()).done == []

    text = (quick.folder / "table3.md").read_text()
    for method, name in (("full", "Full-FT"), ("frozen", "Frozen")):
        values = 100 * np.array([quick_recipe.score(1e-3, seed, method) for seed in range(3)])
        assert f"| Tiny | {name} | 26,112 (0.11 %) | {values.mean():.1f} ± {values.std(ddof=1):.1f} (n=3) |" in text
        assert f"| Tiny | quick | {name} | 0.001 | 0.0001, 0.001, 0.01 | 3 | 26,112 | 770 | 133 | 60 |" in text
    assert f"*paper, BERT-base* | *Full-FT* |  | *70.5{MARK}*" in text
    assert f"*paper, BERT-base* | *Frozen* |  | *56.9{MARK}*" in text
    assert paper.NOTE in text
    assert "not checked against the PDF" in paper.NOTE
    assert "the learning rate is chosen on the dev set that is reported" in text
    assert "Nothing: all 10 runs are there." in text
    assert "commit: 0123456789ab\n" in text
    assert "hardware: cores 1, cpu a processor" in text
    assert "at the edge" not in text


def test_what_is_missing_is_shown_with_the_command_that_goes_on(quick):
    config = quick.config()
    store = RunStore(quick.folder)
    full, _ = plan.expand(config, ["table3"])
    fill(store, full, {(1e-3, 0): 0.7, (1e-4, 0): 0.6})
    reproduce.main(quick.argv("--render_only"))

    text = (quick.folder / "table3.md").read_text()
    assert "| 70.0\\* (n=1, 2/5 runs) |" in text
    assert "| – (0/5 runs) |" in text
    assert "\\* Not every learning rate of the grid has been tried yet." in text
    assert "8 of 10 runs." in text
    assert "- Tiny, quick: full 3/5, frozen 5/5" in text
    (command,) = re.findall(r"```bash\n(.*)\n```", text)
    script, *options = shlex.split(command)[1:]
    assert (ROOT / script).samefile(reproduce.__file__)
    sweep = reproduce.main([*options, "--results_dir", str(quick.results)])
    assert len(sweep.done) == 8
    assert "Nothing: all 10 runs are there." in (quick.folder / "table3.md").read_text()


def test_local_data_is_in_the_command_without_its_path(quick, tmp_path):
    quick.config()
    reproduce.main(quick.argv("--render_only", "--data_dir", str(tmp_path / "secret")))
    text = (quick.folder / "table3.md").read_text()
    assert '--data_dir "$DATA_DIR"' in text
    assert "secret" not in text


def wait_for(condition: Any, process: subprocess.Popen[str], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{what} did not happen: {process.communicate()[0][-3000:]}")
        time.sleep(0.02)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stopped(quick):
    blocked = Path(f"{quick.log}.block")
    blocked.write_text("1e-4")  # the second rate of the grid: two runs are done before it
    process = quick.start()
    wait_for(lambda: "quick/full/0.0001/0" in quick.began(), process, "the run to be killed in")
    store = RunStore(quick.folder)
    half = plan.expand(quick.config(), ["table3"])[0].run(1e-4, 0)
    wait_for((store.work / half.id / "half-finished").exists, process, "the run's first file")
    assert store.is_claimed(half)
    kill(process)
    blocked.unlink()

    assert not store.is_claimed(half), "a claim outlived its process"
    kept = {path.name: path.read_bytes() for path in store.runs.iterdir()}
    assert len(kept) == 2
    sweep = reproduce.main(quick.argv())
    assert len(sweep.done) == 8
    assert {name: (store.runs / name).read_bytes() for name in kept} == kept
    began = quick.began()
    assert len(began) == 11
    assert {name for name in began if began.count(name) > 1} == {"quick/full/0.0001/0"}
    assert not [path for path in store.work.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_concurrent_sweeps_never_do_a_run_twice(quick):
    task = study_values()["tasks"]["quick"]
    quick.config(tasks={"quick": {**task, "arguments": {"name": "quick", "pause": 0.2}}})
    processes = [quick.start() for _ in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    began = quick.began()
    assert len(began) == len(set(began)) == 10
    counts = [int(re.search(r"(\d+) runs done", output)[1]) for output in outputs]
    assert sum(counts) == 10


def test_a_run_of_another_process_is_left_to_it(quick):
    config = quick.config()
    full, _ = plan.expand(config, ["table3"])
    store = RunStore(quick.folder)
    with store.claim(full.run(1e-3, 0)) as folder:
        assert folder.is_dir()
        sweep = reproduce.main(quick.argv("--methods", "full"))
        assert sweep.elsewhere == 1
    assert len(sweep.done) == 2
    assert "quick/full/0.001/0" not in quick.began()
    assert len(reproduce.main(quick.argv("--methods", "full")).done) == 3


def test_shards_are_the_whole_plan_and_have_no_run_in_common(quick):
    done = [reproduce.main(quick.argv("--shard", f"{index}/2")).done for index in range(2)]
    assert [len(ids) for ids in done] == [5, 5]
    assert all("full" in run for run in done[0])
    assert all("frozen" in run for run in done[1])


def test_a_selection_is_all_that_is_done(quick):
    sweep = reproduce.main(quick.argv("--methods", "frozen", "--learning_rates", "1e-3", "1e-2", "--seeds", "0"))
    assert sorted(quick.began()) == ["quick/frozen/0.001/0", "quick/frozen/0.01/0"]
    assert len(sweep.done) == 2


def test_no_run_is_started_that_would_not_end_in_time(quick):
    config = quick.config()
    store = RunStore(quick.folder)
    full, _ = plan.expand(config, ["table3"])
    fill(store, full, {(1e-3, 0): 0.7})  # took a minute, by its record
    sweep = reproduce.main(quick.argv("--time_limit", "0.5"))
    assert sweep.done == []
    assert "time limit" in sweep.stopped
    sweep = reproduce.main(quick.argv("--time_limit", "2", "--methods", "full"))
    assert len(sweep.done) == 4
    assert sweep.stopped is None


def test_cheapest_first(quick):
    config = quick.config()
    store = RunStore(quick.folder)
    cells = plan.expand(config, ["table3"])
    costs = cost.CostModel(config, store, cells)
    costs.learn(cells[0].run(1e-3, 0), 100.0)
    costs.learn(cells[1].run(1e-3, 0), 10.0)
    waiting = runner.pending(cells, store, "best", plan.Selection())
    assert [run.method.name for run in runner.in_order(waiting, "cheapest", costs)] == ["frozen"] * 3 + ["full"] * 3
    assert [run.method.name for run in runner.in_order(waiting, "useful", costs)] == ["full", "frozen"] * 3


def test_a_failed_run_stops_the_sweep_or_is_named_at_the_end(quick):
    failing = Path(f"{quick.log}.fail")
    failing.write_text("1e-3")
    with pytest.raises(RuntimeError, match="told to fail"):
        reproduce.main(quick.argv())
    assert quick.began() == ["quick/full/0.001/0"]
    with pytest.raises(SystemExit, match=r"quick-Tiny-full-lr0\.001.*told to fail"):
        reproduce.main(quick.argv("--keep_going"))
    assert len(list((quick.folder / "runs").iterdir())) == 4
    assert "6 of 10 runs." in (quick.folder / "table3.md").read_text()
    failing.unlink()
    assert len(reproduce.main(quick.argv()).done) == 6


@pytest.mark.parametrize("damage", ["cut", "another", "empty", "no metrics", "bad rows"])
def test_a_damaged_file_is_an_error_that_names_it_or_is_repeated(quick, damage):
    fill_all(quick.config(), RunStore(quick.folder))
    first, second = sorted((quick.folder / "runs").iterdir())[:2]
    whole = first.read_text()
    values = json.loads(whole)
    values["record"].pop("metrics")
    rows = json.loads(whole) | {"bias_change": [{"term": "query"}]}
    first.write_text(
        {
            "cut": whole[:-40],
            "another": second.read_text(),
            "empty": "",
            "no metrics": json.dumps(values),
            "bad rows": json.dumps(rows),
        }[damage]
    )
    with pytest.raises(SystemExit, match=rf"{re.escape(str(first))} is damaged.*--repeat_damaged"):
        reproduce.main(quick.argv())
    assert not quick.began()
    sweep = reproduce.main(quick.argv("--repeat_damaged"))
    assert sweep.done == [first.stem]
    assert first.with_suffix(".damaged").exists()
    assert json.loads(first.read_text())["record"] == json.loads(whole)["record"]


def test_a_record_that_could_not_be_read_again_is_not_written(quick):
    store = RunStore(quick.folder)
    (cell, _) = plan.expand(quick.config(), ["table3"])
    with pytest.raises(ValueError, match="history"):
        store.put(cell.run(1e-3, 0), {"metrics": {}}, 1.0)
    assert not store.runs.exists()
    store.put(cell.run(1e-3, 0), quick_recipe.record(1e-3, 0, "full", 0.5), 1.0)
    store.path(cell.run(1e-3, 0)).write_text("{")
    with pytest.raises(DamagedRunError):
        store.get(cell.run(1e-3, 0))


# --- choice and averages ---


def cell_and_store(quick, **changes: Any) -> tuple[plan.Cell, RunStore]:
    (cell, _) = plan.expand(quick.config(**changes), ["table3"])
    return cell, RunStore(quick.folder)


def test_mean_and_deviation_are_numpys(quick):
    cell, store = cell_and_store(quick)
    assert aggregate.summarize(cell, store).values == ()
    values = {(1e-3, 0): 0.71, (1e-3, 1): 0.64, (1e-3, 2): 0.69}
    fill(store, cell, {(1e-4, 0): 0.2, (1e-2, 0): 0.1} | values)
    found = aggregate.summarize(cell, store)
    assert found.values == tuple(values.values())
    assert found.mean == pytest.approx(np.mean(list(values.values())))
    assert found.std == pytest.approx(np.std(list(values.values()), ddof=1))
    assert found.complete
    final = aggregate.summarize(cell, store, which="final")
    assert final.mean == pytest.approx(found.mean - 0.05)
    assert aggregate.summarize(cell, store, metric="f1").mean == pytest.approx(found.mean / 2)
    with pytest.raises(KeyError, match="no metric 'bleu'"):
        aggregate.summarize(cell, store, metric="bleu")


def test_the_learning_rate_is_the_best_on_the_dev_set(quick):
    cell, store = cell_and_store(quick)
    assert aggregate.choose(cell, store) is None
    fill(store, cell, {(1e-4, 0): 0.6})
    choice = aggregate.choose(cell, store)
    assert (choice.learning_rate, choice.tried, choice.complete) == (1e-4, 1, False)
    assert aggregate.settled(cell, store) is None
    fill(store, cell, {(1e-3, 0): 0.7, (1e-2, 0): 0.7})
    assert aggregate.settled(cell, store) == 1e-3, "between equals the smaller rate"
    # Only the first seed chooses where the others follow its choice, even if some have been run at other rates.
    fill(store, cell, {(1e-4, 1): 0.99, (1e-3, 1): 0.1, (1e-2, 1): 0.1})
    assert aggregate.settled(cell, store) == 1e-3
    assert len(aggregate.summarize(cell, store).values) == 2


def test_with_a_whole_grid_for_every_seed_the_best_mean_is_chosen(quick):
    cell, store = cell_and_store(quick, seeds_at_best=False)
    fill(store, cell, {(rate, 0): value for rate, value in zip(RATES, (0.6, 0.7, 0.1))})
    assert aggregate.choose(cell, store).learning_rate == 1e-3
    fill(store, cell, {(rate, 1): value for rate, value in zip(RATES, (0.9, 0.7, 0.1))})
    choice = aggregate.choose(cell, store)
    assert (choice.learning_rate, choice.seeds) == (1e-4, (0, 1))
    fill(store, cell, {(1e-3, 2): 1.0})  # a seed that not every rate has does not count
    assert aggregate.choose(cell, store).learning_rate == 1e-4


def test_a_run_that_diverged_is_the_worst_and_is_shown_as_such(quick):
    cell, store = cell_and_store(quick)
    fill(store, cell, {(1e-4, 0): None, (1e-3, 0): 0.01, (1e-2, 0): None})
    assert aggregate.settled(cell, store) == 1e-3
    fill(store, cell, {(1e-3, 1): None})
    reproduce.main(quick.argv("--render_only"))
    assert "| diverged" in (quick.folder / "table3.md").read_text()


def test_a_choice_at_the_edge_of_its_grid_is_said(quick):
    cell, store = cell_and_store(quick)
    fill(store, cell, {(1e-4, 0): 0.9, (1e-3, 0): 0.7, (1e-2, 0): 0.6})
    assert aggregate.at_edge(aggregate.summarize(cell, store)) == "lowest"
    reproduce.main(quick.argv("--render_only"))
    assert "so a wider one might do better: Tiny quick Full-FT (lowest)." in (quick.folder / "table3.md").read_text()


def test_costs_are_estimated_from_the_runs_that_are_there(quick):
    config = quick.config(ms_per_token={"default": 2.0, "full": 5.0})
    cells, store = plan.expand(config, ["table3"]), RunStore(quick.folder)
    full, frozen = cells
    tokens = 100 * 10.0 * 2  # rows × tokens × epochs

    def bill() -> cost.Bill:
        return cost.bill(cells, store, cost.CostModel(config, store, cells), "best", plan.Selection())

    found = bill()
    assert (found.missing, len(found.runs), found.waiting, found.assumed) == (10, 6, 4, 10)
    assert found.tokens == 10 * tokens
    assert found.seconds == pytest.approx(5 * tokens * 0.005 + 5 * tokens * 0.002)
    fill(store, full, {(1e-3, 0): 0.7})  # 60 s
    found = bill()
    assert (found.missing, found.assumed) == (9, 0)
    assert found.seconds == pytest.approx(4 * 60 + 5 * 60), "by the token, as the same model's other method"
    model = cost.CostModel(config, store, cells)
    assert model.estimate(frozen.run(1e-3, 0)).source == "runs of the same model"
    assert cost.CostModel(quick.config(), store, []).estimate(full.run(1e-3, 0)).seconds is None


def test_a_plan_of_unknown_length_says_so_and_cuts_no_name(quick, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    long = "bitfit:query+intermediate"
    quick.config(
        methods={long: {"learning_rates": RATES}, "full": {"learning_rates": RATES}},
        studies={"table3": [{"tasks": ["quick"], "methods": [long]}]},
    )
    reproduce.main(quick.argv("--dry_run"))
    shown = capsys.readouterr().out
    assert long in shown
    assert "3 runs of unknown length" in " ".join(shown.split())
    assert "hours" not in shown
    quick.config(ms_per_token={"default": 2.0})
    reproduce.main(quick.argv("--dry_run"))
    assert "about 0.0 hours (10 runs at the speed" in " ".join(capsys.readouterr().out.split())


# --- the paper's figures ---


def test_the_paper_has_two_kinds_of_figures():
    assert str(paper.glue("BERT-base", "bitfit", "CoLA")) == f"58.8{MARK}"
    assert str(paper.glue("BERT-large", "diff_pruning", "avg", "test")) == f"81.5{MARK}"
    assert str(paper.pos("RoBERTa-base", "bitfit")) == "97.1"
    assert paper.percent_trained("BERT-base", "bitfit").source == paper.CHECKED
    assert paper.percent_trained("BERT-base", "bitfit:query").source == paper.RECALLED
    assert paper.glue("BERT-base", "lora", "CoLA") is None
    assert paper.glue("BERT-base", "bitfit", "WNLI") is None


def test_the_recalled_rows_are_whole_and_their_averages_fit():
    """Nine figures and their mean: a slip of the pen would show. The one row that does not fit came so."""
    apart = {}
    for split, models in paper._GLUE.items():
        for model, methods in models.items():
            for method in methods:
                values = [paper.glue(model, method, column, split).value for column in paper.COLUMNS]
                average = paper.glue(model, method, "avg", split).value
                apart[split, model, method] = abs(float(np.mean(values)) - average)
    assert len(apart) == 17
    limits = {"dev": 0.25, "test": 0.6}
    assert [row for row, value in apart.items() if value > limits[row[0]]] == [("dev", "BERT-base", "frozen")]


# --- figures and claims ---


CHANGES = [
    BiasChangeRow("query", "b_q", 0, "", 0.02, 16),
    BiasChangeRow("query", "b_q", 1, "", 0.04, 16),
    BiasChangeRow("key", "b_k", 0, "", 0.0001, 16),
    BiasChangeRow("key", "b_k", 1, "", 0.0002, 16),
    BiasChangeRow("intermediate", "b_m2", 0, "", 0.05, 32),
]


@pytest.fixture
def pictured(quick):
    """A config with all figures, and runs of BitFit and Full-FT in which BitFit has the smaller gap."""
    sizes = {
        f"squad_{size}": {
            "recipe": "squad",
            "arguments": {"train_size": size, "min_steps": 50, "batch_size": 8},
            "columns": {"EM": "exact_match", "F1": "f1"},
            "in_percent": True,
            "paper": False,
        }
        for size in (100, 200, 400)
    }
    both = {"methods": ["full", "bitfit"]}
    config = quick.config(
        tasks={**study_values()["tasks"], **sizes},
        studies={
            "figure1": [{"tasks": ["quick"], "methods": ["bitfit"]}],
            "figure2": [{"tasks": list(sizes), **both, "learning_rates": {"full": [1e-3], "bitfit": [1e-3]}}],
            "generalization_gap": [{"tasks": ["quick"], **both, "seeds": [0, 1]}],
        },
    )
    store = RunStore(quick.folder)
    for cell in plan.expand(config, config.studies):
        bitfit = cell.method.name == "bitfit"
        for run in {run.id: run for run in cell.wanted(1e-3)}.values():
            value = quick_recipe.SCORES[run.learning_rate]
            made = quick_recipe.record(run.learning_rate, run.seed, cell.method.name, value)
            if cell.task.in_percent:
                ahead = {100: 4.0, 200: 1.0, 400: -3.0}[cell.task.train_rows]
                made["metrics"]["best"] = {"exact_match": 40.0 + ahead * bitfit, "f1": 50.0}
                made["history"] = []
            for entry in made["history"]:
                entry["train"]["accuracy"] = entry["eval"]["accuracy"] + (0.02 if bitfit else 0.2) + 0.01 * run.seed
            store.put(run, made, 60.0, CHANGES if bitfit else [])
    return config, store, quick


def test_figures_are_drawn_from_stored_runs(pictured, monkeypatch):
    _, _, quick = pictured
    monkeypatch.setattr(runner.RecipeRunner, "__call__", lambda *_: pytest.fail("a run was started"))
    options = ["--figure", "1", "2", "--study", "generalization_gap", "--config", str(quick.path)]
    assert reproduce.main([*options, "--results_dir", str(quick.results)]).done == []
    for name in figures.TITLES:
        assert (quick.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in (quick.folder / f"{name}.md").read_text()
    first = (quick.folder / "figure1.md").read_text()
    assert "| b_m2 | 0.050000 | 1.667 |" in first
    assert "| b_k | 0.000150 | 0.005 |" in first
    second = (quick.folder / "figure2.md").read_text()
    assert "| Tiny | 100 | 40.0 (n=1) | 44.0 (n=1) | 50.0 (n=1) | 50.0 (n=1) |" in second
    assert "at least 50 steps" in second
    gap = (quick.folder / "generalization_gap.md").read_text()
    assert "| Tiny | quick | Full-FT | 95.5 | 75.0 | 20.5 ± 0.7 | 2 |" in gap
    assert "| Tiny | quick | BitFit | 77.5 | 75.0 | 2.5 ± 0.7 | 2 |" in gap


def test_pictures_show_what_there_is(pictured):
    """No error bar of a single seed, one legend apart from the curves, epochs as whole numbers."""
    config, store, _ = pictured
    context = Context(config, store, "quick")
    _, by_size = figures._by_size(plan.expand(config, ["figure2"]), context)
    assert not by_size.axes[0].containers  # every size has one seed
    _, gap = figures._gap(plan.expand(config, ["generalization_gap"]), context)
    for picture in (by_size, gap):
        assert [len(legend.get_texts()) for legend in picture.legends] == [2 if picture is by_size else 4]
        assert all(axis.get_legend() is None for axis in picture.axes)
    assert [label.get_text() for label in gap.axes[0].get_xticklabels()] == ["1", "2"]
    for cell in plan.expand(config, ["figure2"]):
        if cell.task.train_rows == 100:
            other = dataclasses.replace(cell, seeds={0: 0, 1: 0})
            store.put(other.run(1e-3, 1), store.get(other.run(1e-3, 0)).record, 60.0)
    cells = [dataclasses.replace(cell, seeds={0: 0, 1: 0}) for cell in plan.expand(config, ["figure2"])]
    _, by_size = figures._by_size(cells, context)
    assert [len(bars.lines[2][0].get_segments()) for bars in by_size.axes[0].containers] == [1, 1]


def test_a_figure_without_runs_has_no_picture(quick):
    quick.config(studies={"figure1": [{"tasks": ["quick"], "methods": ["bitfit"]}]})
    options = ["--figure", "1", "--render_only", "--config", str(quick.path)]
    reproduce.main([*options, "--results_dir", str(quick.results)])
    assert not (quick.folder / "figure1.png").exists()
    assert "3 of 3 runs." in (quick.folder / "figure1.md").read_text()


def test_claims_about_figures(pictured):
    config, store, _ = pictured
    text = claims.render_claims(plan.expand(config, config.studies), Context(config, store, "quick"))
    assert "| Tiny | quick | 1 | 0.50% | 0.30% | agrees |" in text
    assert "| Tiny | quick | 2.5 | 20.5 | -18.0 | 2, 2 | agrees |" in text
    assert "| Tiny | 100 | +4.0 | BitFit ahead | agrees (one seed: noise unknown) |" in text
    assert "| Tiny | 400 | -3.0 | Full-FT ahead | agrees (one seed: noise unknown) |" in text
    assert "as many random parameters (rand uniform) are below BitFit | **not enough data** |" in text


@pytest.mark.parametrize(
    ("difference", "error", "low", "high", "expected"),
    [
        (-0.5, 0.1, -1.0, np.inf, "agrees"),
        (-0.9, 0.1, -1.0, np.inf, "agrees (within noise)"),
        (-3.0, 0.1, -1.0, np.inf, "disagrees"),
        (-1.1, 0.5, -1.0, np.inf, "disagrees (within noise)"),
        (2.0, None, -np.inf, 0.0, "disagrees (one seed: noise unknown)"),
        (np.nan, None, -np.inf, 0.0, "not enough data"),
    ],
)
def test_a_verdict(difference, error, low, high, expected):
    assert claims.verdict(difference, error, low, high) == expected


def test_the_standard_error_is_that_of_a_difference_of_means():
    first, second = [0.7, 0.8, 0.6], [0.5, 0.4]
    expected = np.sqrt(np.var(first, ddof=1) / 3 + np.var(second, ddof=1) / 2)
    assert claims.standard_error(first, second) == pytest.approx(expected)
    assert claims.standard_error(first, [0.5]) is None


def test_a_claim_that_our_runs_contradict_is_said_to_be_so(quick):
    config = quick.config(
        studies={"table3": [{"tasks": ["quick"], "methods": ["bitfit", "rand_uniform"], "seeds": [0, 1, 2]}]}
    )
    store = RunStore(quick.folder)
    for cell in plan.expand(config, ["table3"]):
        better = 0.1 if cell.method.name == "rand_uniform" else 0.0
        grid = {(1e-4, 0): 0.1, (1e-2, 0): 0.1}
        fill(store, cell, grid | {(1e-3, seed): 0.6 + better + 0.001 * seed for seed in range(3)})
    reproduce.main([*quick.argv("--render_only")])
    text = (quick.folder / "claims.md").read_text()
    assert "| Tiny | quick | 70.1 ± 0.1 (n=3) | 60.1 ± 0.1 (n=3) | +10.0 | disagrees |" in text
    assert "are below BitFit | **0 of 1 task agrees** |" in text


# --- real runs ---


@pytest.fixture
def real(tmp_path, study_data):
    """A study of the real recipes, tiny: MNLI has two columns, and the other recipes have metrics of other names."""
    tiny = {"epochs": 1, "train_size": 8, "eval_size": 6, "batch_size": 4, "max_length": 32, "train_metrics": 4}
    values = {
        "name": "real",
        "models": {"Tiny": {"model_name_or_path": "someone/tiny-bert"}},
        "arguments": tiny,
        "methods": {"bitfit": {"learning_rates": [1e-2]}, "rand_uniform": {"learning_rates": [1e-2]}},
        "tasks": {
            "mnli": {
                "recipe": "glue",
                "arguments": {"task": "mnli"},
                "columns": {"MNLI-m": "accuracy", "MNLI-mm": "mismatched_accuracy"},
            },
            "tags": {"recipe": "token_classification", "columns": {"UPOS": "accuracy"}, "paper": False},
            "squad": {
                "recipe": "squad",
                "arguments": {"min_steps": 2, "doc_stride": 8, "max_question_length": 12, "max_length": 48},
                "columns": {"EM": "exact_match", "F1": "f1"},
                "in_percent": True,
                "paper": False,
            },
        },
        "studies": {
            "table3": [
                {"tasks": ["mnli"], "methods": ["bitfit", "rand_uniform"]},
                {"tasks": ["tags", "squad"], "methods": ["bitfit"]},
            ]
        },
    }
    path = tmp_path / "real.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def real_argv(real: Path, study_base: str, study_data: Path, tmp_path: Path) -> list[str]:
    places = ["--data_dir", str(study_data), "--model_path", f"Tiny={study_base}"]
    return ["--table", "3", "--config", str(real), "--results_dir", str(tmp_path / "results"), *places]


@pytest.mark.slow
def test_a_killed_sweep_of_real_runs_goes_on(real, study_base, study_data, tmp_path):
    argv = real_argv(real, study_base, study_data, tmp_path)
    runs = tmp_path / "results" / "real" / "runs"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    script = str(Path(reproduce.__file__))
    process = subprocess.Popen(
        [sys.executable, script, *argv],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: list(runs.glob("*.json")), process, "the first run", 200)
    kill(process)
    kept = {path.name: path.read_bytes() for path in runs.glob("*.json")}
    assert 1 <= len(kept) < 4

    sweep = reproduce.main([*argv, "--keep_outputs", str(tmp_path / "outputs")])
    assert len(sweep.done) == 4 - len(kept)
    assert {name: (runs / name).read_bytes() for name in kept} == kept
    text = (runs.parent / "table3.md").read_text()
    assert "Nothing: all 4 runs are there." in text
    for file in [*runs.iterdir(), *runs.parent.glob("*.md")]:
        assert str(tmp_path.parent) not in file.read_text(), f"{file.name} holds a path"
        assert str(study_base) not in file.read_text()
    stored = {path.name: json.loads(path.read_text()) for path in runs.iterdir()}
    for name, values in stored.items():
        lines = [line for line in (runs / name).read_text().splitlines() if '"symbol"' in line]
        assert len(lines) == len(values["bias_change"])  # a line each
        assert bool(values["bias_change"]) == ("bitfit" in name)
        assert all(
            row.keys() == {"term", "symbol", "layer", "stack", "value", "size"} for row in values["bias_change"]
        )
        assert values["spec"]["model"] == "someone/tiny-bert"
    for run in sweep.done:
        assert (tmp_path / "outputs" / run / "run.json").is_file()
        assert (tmp_path / "outputs" / run / "log.txt").read_text().strip()
    mnli = next(values for name, values in stored.items() if name.startswith("mnli-Tiny-bitfit"))
    cells = plan.expand(studies.read_config(real), ["table3"])
    second = aggregate.summarize(cells[0], RunStore(runs.parent), "mismatched_accuracy")
    assert second.mean == mnli["record"]["metrics"]["best"]["mismatched_accuracy"]
    squad = aggregate.summarize(cells[-1], RunStore(runs.parent))
    assert squad.cell.task.name == "squad"
    assert 0 <= squad.mean <= 1


@pytest.mark.slow
def test_two_processes_train_one_run_together(real, study_base, study_data, tmp_path):
    done = launch_two("reproduction/reproduce", *real_argv(real, study_base, study_data, tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("4 runs done.") == 1
    stored = [json.loads(path.read_text()) for path in (tmp_path / "results" / "real" / "runs").iterdir()]
    assert [values["record"]["hardware"]["processes"] for values in stored] == [2] * 4


def test_the_options_have_help():
    text = HfArgumentParser(reproduce.ReproduceArguments).format_help()
    assert text.count("--") > 15
