"""The benchmark of the bank's engines, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from transformers import HfArgumentParser

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from benchmarks import engines


@pytest.mark.slow
def test_the_benchmark_writes_figures_and_a_plot(study_base, tmp_path):
    out = tmp_path / "results" / "engines.json"
    options = ["--tasks", "1", "4", "--shapes", "1x4", "3x5", "--rounds", "2", "--warmup", "0"]
    engines.main([*options, "--model", study_base, "--output", str(out)])
    record = json.loads(out.read_text())
    rows = record["throughput"]
    systems = {f"{kind} {engine}" for kind in ("plain", "bank") for engine in engines.ENGINES}
    assert {row["system"] for row in rows} == systems
    assert len(rows) == len(systems) * 2 * 2
    for row in rows:
        if row["system"].startswith("plain"):
            assert row["of_plain"]["median"] == 1
        if row["system"] == "bank torch":
            assert row["faster_than_torch_bank"]["median"] == 1
    assert record["largest_difference"]["onnxruntime"] < 1e-4
    sizes = {engine: size["bytes_per_task"] for engine, size in record["memory"].items()}
    assert set(sizes) == set(engines.ENGINES)
    assert len(set(sizes.values())) == 1, "a task takes the same memory whatever the engine"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_in_the_header_parse():
    commands = re.findall(r"^    python recipes/benchmarks/engines\.py([^#\n]*)", engines.__doc__, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        HfArgumentParser(engines.Arguments).parse_args_into_dataclasses(shlex.split(command))
