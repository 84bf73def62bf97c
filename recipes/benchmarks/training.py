"""What a training step costs: BitFit and its lean path against their peers, in one interleaved run.

    python recipes/benchmarks/training.py                                     # every shape; hours on two CPU cores
    python recipes/benchmarks/training.py --shapes minilm bert-base --rounds 15
    python recipes/benchmarks/training.py --shapes bert-large --systems "BitFit" "BitFit, lean" --rounds 5
    python recipes/benchmarks/training.py --render_only

Measured are step time, activations kept for the backward pass, peak memory, optimizer state, bytes that data-parallel
training sends per step, and a task's size on disk and its time to save, load and switch to. Compared are full
fine-tuning, biases unfrozen by hand (the floor: no wrapper at all), BitFit through the tuner, also with activations
computed again, PEFT's BEFT on every Linear, LayerNorm tuning, LoRA on q and v and on all Linears, and the head alone.
It runs on the GPU where there is one, else on the CPU.

Each shape gives one JSON file in `recipes/benchmarks/results/`, and is left out if its file is there: a run that was
broken off goes on where it stopped. `training.md` and `training.png` beside them show all files that are there. The
reference takes part in every run, since times are compared within a run only. The models are random: a step's cost
does not depend on the values.
"""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the recipes are found beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from common.arguments import parse
from common.record import checkout, hardware, versions
from rich.console import Console
from rich.table import Table

from benchmarks.kept import kept_bytes
from benchmarks.memory import peak_bytes
from benchmarks.report import FORMAT, read_results, render, write_result
from benchmarks.storage import storage_costs
from benchmarks.systems import REFERENCE, SHAPES, SYSTEMS, Shape, num_trainable, prepare, tiny
from benchmarks.timing import Stepper, compare, interleave

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"


@dataclass
class BenchmarkArguments:
    """What to measure, and how long."""

    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"help": f"Among {', '.join(SHAPES)}."})
    systems: list[str] = field(
        default_factory=lambda: list(SYSTEMS),
        metadata={"help": f"Among {', '.join(map(repr, SYSTEMS))}; {REFERENCE!r} always takes part."},
    )
    rounds: int = field(default=15, metadata={"help": "Counted steps of each system."})
    warmup: int = field(default=2, metadata={"help": "Steps before, not counted."})
    device: str | None = field(default=None, metadata={"help": "'cpu' or 'cuda'; by default the GPU if there is one."})
    peak_memory: bool = field(default=True, metadata={"help": "Also measure peak memory (on a CPU: a process each)."})
    storage: bool = field(default=True, metadata={"help": "Also measure saving, loading and switching."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Where the results go."})
    overwrite: bool = field(default=False, metadata={"help": "Measure shapes again whose result is there."})
    render_only: bool = field(default=False, metadata={"help": "Write Markdown and plot of what is there."})
    tiny: bool = field(default=False, metadata={"help": "Models of toy size, to try the script."})


def measure(name: str, shape: Shape, arguments: BenchmarkArguments, device: torch.device) -> dict[str, Any]:
    """Measures one shape.

    Args:
        name (`str`): Of the shape.
        shape ([`Shape`]): The model.
        arguments ([`BenchmarkArguments`]): Which systems, and how long.
        device (`torch.device`): Where.

    Returns:
        `dict[str, Any]`: What its JSON file holds.
    """
    systems = [system for system in SYSTEMS if system in {*arguments.systems, REFERENCE}]
    threads = torch.get_num_threads()
    # One after the other, while no other system's model takes memory.
    peaks = {
        system: peak_bytes(system, shape, device, threads) if arguments.peak_memory else None for system in systems
    }
    batch = shape.batch(device)
    base = shape.build().to(device)
    steppers = {system: Stepper(prepare(system, shape, base=base, device=device), batch) for system in systems}
    turns = {system: stepper.step for system, stepper in steppers.items()}
    times = interleave(turns, rounds=arguments.rounds, warmup=arguments.warmup)
    rows = []
    for system, stepper in steppers.items():
        row = {
            "system": system,
            "trainable": num_trainable(stepper.model),
            **compare(times[system], times[REFERENCE]),
            "kept_bytes": kept_bytes(stepper.model, batch),
            "peak_bytes": peaks[system],
            "optimizer_bytes": stepper.optimizer_bytes(),
            "gradient_bytes": stepper.gradient_bytes(),
        }
        storage = ("disk_bytes", "save_seconds", "load_seconds", "switch_seconds")
        row |= storage_costs(system, stepper.model) if arguments.storage else dict.fromkeys(storage)
        rows.append(row | {"all_seconds": times[system]})
    commit, dirty = checkout()
    return {
        "format": FORMAT,
        "shape": name,
        "device": device.type,
        "model": asdict(shape),
        "rounds": arguments.rounds,
        "reference": REFERENCE,
        "rows": rows,
        "hardware": hardware(1, device),
        "versions": versions(),
        "commit": commit,
        "dirty": dirty,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the figures that matter most."""
    table = Table(title=f"{result['shape']} on {result['hardware']['device']}")
    for heading in ("system", "trainable", f"time / {REFERENCE}", "±", "kept (MiB)"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for row in result["rows"]:
        kept = f"{row['kept_bytes'] / 2**20:.1f}"
        table.add_row(row["system"], f"{row['trainable']:,}", f"{row['ratio']:.3f}", f"{row['spread']:.3f}", kept)
    console.print(table)


def run(arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """Measures what is missing, writes it, and renders all that is there.

    Args:
        arguments ([`BenchmarkArguments`]): See there.

    Returns:
        `list[dict[str, Any]]`: All results of the folder.
    """
    for kind, given, known in (("shapes", arguments.shapes, SHAPES), ("systems", arguments.systems, SYSTEMS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise SystemExit(f"--{kind}: {unknown} are not known; choose among {list(known)}.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder, console = Path(arguments.results_dir), Console()
    for name in () if arguments.render_only else arguments.shapes:
        if (folder / f"training-{name}-{device.type}.json").exists() and not arguments.overwrite:
            console.print(f"{name}: the result is there; --overwrite measures again.")
            continue
        shape = tiny(SHAPES[name]) if arguments.tiny else SHAPES[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT, about bases that are not on the Hub
            result = measure(name, shape, arguments, device)
        write_result(folder, result)
        show(result, console)
        gc.collect()
    for path in render(folder):
        console.print(f"Wrote {path}")
    return read_results(folder)


def main(argv: list[str] | None = None) -> None:
    run(parse(BenchmarkArguments, argv, description=__doc__))


if __name__ == "__main__":
    main()
