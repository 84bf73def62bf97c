"""The benchmark of training, with models of toy size: every system runs, and the figures are what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import training
from benchmarks.kept import kept_bytes
from benchmarks.memory import peak_bytes
from benchmarks.report import MARKDOWN, PLOT, markdown, read_results, seconds, size
from benchmarks.systems import BITFIT, FULL, LEAN, REFERENCE, SHAPES, SYSTEMS, num_trainable, prepare, tiny
from benchmarks.timing import compare, interleave, median_seconds
from benchmarks.training import BenchmarkArguments
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two shapes."""
    place = tmp_path_factory.mktemp("results")
    options = ["--tiny", "--rounds", "3", "--warmup", "1", "--peak_memory", "false", "--device", "cpu"]
    training.main([*options, "--shapes", "minilm", "decoder-1b", "--results_dir", str(place)])
    return place


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {result["shape"]: result for result in read_results(folder)}


def rows(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in result["rows"]}


@pytest.mark.parametrize("shape", ["minilm", "decoder-1b"])
def test_every_system_is_measured(results: dict[str, dict[str, Any]], shape: str) -> None:
    found = rows(results[shape])
    assert list(found) == list(SYSTEMS)
    assert len(found) == 9
    for name, row in found.items():
        assert len(row["all_seconds"]) == 3, name
        assert row["ratio"] == compare(row["all_seconds"], found[REFERENCE]["all_seconds"])["ratio"], name
        assert row["gradient_bytes"] == 4 * row["trainable"] > 0, name
        assert row["optimizer_bytes"] >= 8 * row["trainable"], name  # two moments, and a step each
        assert row["disk_bytes"] >= 4 * row["trainable"], name
        assert min(row[f"{action}_seconds"] for action in ("save", "load", "switch")) > 0, name


@pytest.mark.parametrize("shape", ["minilm", "decoder-1b"])
def test_the_systems_are_what_they_are_called(results: dict[str, dict[str, Any]], shape: str) -> None:
    found = rows(results[shape])
    trained = {name: row["trainable"] for name, row in found.items()}
    assert trained[BITFIT] == trained[LEAN] == trained[REFERENCE]
    assert trained["head only"] < trained[BITFIT] < trained["LoRA r=8, all Linears"] < trained[FULL]
    assert trained["LoRA r=8, q and v"] < trained["LoRA r=8, all Linears"]
    assert found[REFERENCE]["ratio"] == 1
    assert found[REFERENCE]["spread"] == 0
    kept = {name: row["kept_bytes"] for name, row in found.items()}
    assert kept[LEAN] < kept[BITFIT] < kept[FULL]
    # Beside the vectors b_0 + δ of norms, which here are not small against the activations.
    assert kept[BITFIT] <= kept[REFERENCE] + 4 * trained[BITFIT]
    assert found[BITFIT]["disk_bytes"] < found[FULL]["disk_bytes"] / 3


def test_kept_is_no_more_than_by_hand() -> None:
    shape = tiny(SHAPES["minilm"])
    batch = shape.batch(CPU)
    by_hand, tuned = (prepare(name, shape, device=CPU) for name in (REFERENCE, BITFIT))
    # A LayerNorm keeps its bias as well. By hand that is a parameter, in the tuner a vector `b_0 + δ`: no activation.
    norms = [p for name, p in tuned.named_parameters() if "LayerNorm.bitfit_bias" in name]
    assert len(norms) == 5
    assert kept_bytes(tuned, batch) - sum(4 * p.numel() for p in norms) == kept_bytes(by_hand, batch) > 0


def test_files(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    names = ["training-decoder-1b-cpu.json", "training-minilm-cpu.json", MARKDOWN, PLOT]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert (folder / PLOT).read_bytes().startswith(b"\x89PNG")
    text = (folder / MARKDOWN).read_text()
    assert text.count("\n## ") == 2
    for result in results.values():
        assert result["hardware"]["threads"] == torch.get_num_threads()
        assert {"torch", "peft", "transformers"} <= result["versions"].keys()
        for row in result["rows"]:
            assert f"| {row['system']} | {row['trainable']:,} | " in text
    assert str(folder) not in text + json.dumps(results)


def test_a_second_run_measures_only_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    monkeypatch.setattr(training, "measure", lambda *arguments: pytest.fail("measured again"))
    options = ["--tiny", "--device", "cpu", "--shapes", "minilm", "decoder-1b", "--results_dir", str(folder)]
    training.main(options)
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == before
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        training.main([*options, "--overwrite"])


def test_the_reference_always_takes_part(tmp_path: Path) -> None:
    arguments = BenchmarkArguments(
        shapes=["minilm"],
        systems=["head only"],
        rounds=1,
        warmup=0,
        device="cpu",
        peak_memory=False,
        storage=False,
        results_dir=str(tmp_path),
        tiny=True,
    )
    (result,) = training.run(arguments)
    assert list(rows(result)) == [REFERENCE, "head only"]
    assert rows(result)["head only"]["disk_bytes"] is None
    assert "| head only |" in (tmp_path / MARKDOWN).read_text()


@pytest.mark.parametrize(("option", "name"), [("--shapes", "bert-huge"), ("--systems", "magic")])
def test_unknown_names(option: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=name):
        training.main([option, name, "--results_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_nothing_to_render(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results"):
        training.main(["--render_only", "--results_dir", str(tmp_path)])


# --- the parts ---


def test_ratios_of_fixed_times() -> None:
    # The machine takes twice the time in the second half: medians of times would say 1.5, or anything between.
    reference = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    found = compare([1.5, 1.5, 1.8, 3.0, 3.0, 3.6], reference)
    assert found["ratio"] == pytest.approx(1.5)
    assert found["seconds"] == pytest.approx(2.4)
    assert found["spread"] == pytest.approx((1.8 - 1.5) / 2)
    assert compare([3.0], [2.0]) == {"seconds": 3.0, "ratio": 1.5, "spread": 0.0}
    with pytest.raises(ValueError):
        compare([1.0, 2.0], [1.0])


def test_turns_alternate() -> None:
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    seconds = interleave({"a": lambda: turn("a"), "b": lambda: turn("b")}, rounds=2, warmup=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_median_seconds_leaves_out_the_first_and_what_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock[0])
    durations = iter([100.0, 1.0, 3.0, 2.0])

    def action() -> None:
        clock[0] += next(durations)

    def undo() -> None:
        clock[0] += 50

    assert median_seconds(action, 3, undo=undo) == 2.0


def test_kept_bytes_counts_what_is_kept() -> None:
    class Twice(nn.Module):
        """Keeps the input of the square, and nothing of the product with a number."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100))

        def forward(self, x: torch.Tensor) -> Any:
            scaled = self.weight * 2
            self.loss = None
            return type("Output", (), {"loss": (scaled**2 * x).sum()})

    model, x = Twice(), torch.ones(100)
    # The square's input and its gradient's other factor are the model's business, `x` is the batch's.
    assert kept_bytes(model, {"x": x}) == 400 + 4


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's peak memory")
def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    shape = tiny(SHAPES["minilm"])
    peak = peak_bytes("head only", shape, CPU, 1)
    assert peak is not None
    assert 0 < peak < 2**30


def test_markdown_of_a_result_without_full_fine_tuning(results: dict[str, dict[str, Any]]) -> None:
    result = {**results["minilm"], "rows": [row for row in results["minilm"]["rows"] if row["system"] != FULL]}
    text = markdown([result])
    assert FULL not in text.partition("## ")[2]
    assert text.count("\n| ") == 2 + len(SYSTEMS) - 1


def test_weights_are_shared_and_trained_ones_are_not() -> None:
    shape = SHAPES["minilm"]
    shape = type(shape)(**{**vars(shape), "layers": 1, "vocabulary": 400})
    base = shape.build()
    shared = prepare(REFERENCE, shape, base=base, device=CPU)
    full = prepare(FULL, shape, base=base, device=CPU)
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    for model in (shared, full):
        for name, parameter in model.named_parameters():
            assert not (parameter.requires_grad and parameter.data_ptr() in pointers), name
    assert sum(parameter.data_ptr() in pointers for parameter in shared.parameters()) >= 6
    assert num_trainable(full) == sum(parameter.numel() for parameter in base.parameters())


def test_figures_for_people() -> None:
    assert [size(n) for n in (None, 0, 512, 2048, 5 * 2**20, 3 * 2**30)] == [
        *("", "0 B", "512 B", "2 KiB", "5 MiB", "3,072 MiB")
    ]
    assert [seconds(n) for n in (None, 2e-6, 0.0123, 2.5)] == ["", "2 µs", "12.3 ms", "2.50 s"]
