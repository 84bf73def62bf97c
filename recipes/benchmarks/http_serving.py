"""Many tasks over HTTP: `bitfit serve` against a server for each task, and against Ray Serve's `@serve.multiplexed`.

Every request is one text for a random task. Compared are

- `bank`: `TaskBank.predict` in one process, in batches of 32: what there would be without HTTP;
- `bitfit`: `bitfit serve`, one process for all tasks;
- `merged`: a server for each task, with a merged model, each a process with one thread for it (`http_peers.py`);
- `ray`: our application on Ray Serve, one replica; `multiplexed`: all merged models in one replica of Ray Serve.

A round begins with all that can be, with 32 clients that each wait for their answer, the systems in turn. Then follows
an open loop: requests arrive as a Poisson process with a share of what `bitfit` could do in this round, and a latency
counts from when a request was due. What is compared was measured in the same round, which cancels what the machine did
in it. A system that falls behind a load is not given a larger one. All of it, the load generator too, runs on the same
cores; what the generator takes of them is in the record. A server that has nothing to do takes nothing, but Ray does:
its systems are measured among themselves, beside `bitfit` again.

    python recipes/benchmarks/http_serving.py
    python recipes/benchmarks/http_serving.py --tasks 2 --requests 100 --rounds 1 --shares 0.5 --systems bitfit merged
    python recipes/benchmarks/http_serving.py --output recipes/benchmarks/results/http.json
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the recipes are found beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.load import Client, Outcome, closed_loop, open_loop
from common.record import checkout
from common.server import Running, bitfit_serve, running
from peft import get_peft_model
from quickstart import demo_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from transformers.utils import logging

from benchmarks.records import circumstances, write_record
from benchmarks.serving import TASK, random_delta
from benchmarks.timing import quartiles, ratios
from bitfit_hf import BiasDelta, TaskBank

PEERS = str(Path(__file__).with_name("http_peers.py"))
PLAIN, ON_RAY = ("bitfit", "merged"), ("bitfit", "ray", "multiplexed")
WORDS = "the a movie was not bad at all and i would see it again please cancel my order number for tomorrow".split()
BATCH = 32
_KEPT_UP = 0.9  # of what arrives is answered while it arrives


@dataclass
class Arguments:
    """Sizes of the run."""

    tasks: int = field(default=8, metadata={"help": "Tasks; `merged` takes a process and its memory for each."})
    words: int = field(default=14, metadata={"help": "In a text; MiniLM makes about as many tokens and two of it."})
    requests: int = field(default=2000, metadata={"help": "In each measurement."})
    rounds: int = field(default=5, metadata={"help": "How often all of it is measured."})
    clients: int = field(default=32, metadata={"help": "Of the closed loop."})
    shares: list[float] = field(
        default_factory=lambda: [0.2, 0.4, 0.6, 0.8, 0.9], metadata={"help": "Of what `bitfit` can do, arriving."}
    )
    systems: list[str] = field(default_factory=lambda: [*PLAIN, *ON_RAY[1:]], metadata={"help": "Of the five."})
    model: str | None = field(default=None, metadata={"help": "A BERT instead of the MiniLM of the demo package."})
    output: str | None = field(default=None, metadata={"help": "A JSON file; a plot is drawn beside it."})
    seed: int = 0


class World:
    """The tasks on disk, as deltas and as merged models, and the requests."""

    def __init__(self, args: Arguments, folder: Path) -> None:
        self.args = args
        self.base = args.model or demo_model()
        load = AutoModelForSequenceClassification.from_pretrained
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        template = BiasDelta.from_model(get_peft_model(load(self.base, num_labels=2), TASK))
        self.deltas: dict[str, Path] = {}
        self.merged: list[str] = []
        for number in range(args.tasks):
            delta = random_delta(template, number)
            place = folder / "deltas" / f"task-{number}"
            delta.save_pretrained(place)
            self.deltas[place.name] = place
            if {"merged", "multiplexed"} & set(args.systems):
                model = folder / "merged" / str(number)
                delta.apply_(load(self.base, num_labels=2)).save_pretrained(model)
                tokenizer.save_pretrained(model)
                self.merged.append(str(model))
        rng = random.Random(args.seed)
        self.numbers = rng.choices(range(args.tasks), k=args.requests)
        self.texts = [" ".join(rng.choices(WORDS, k=args.words)) for _ in self.numbers]
        pairs = zip(self.texts, self.numbers, strict=True)
        self.bodies = [json.dumps({"inputs": text, "task": f"task-{number}"}).encode() for text, number in pairs]
        self.bank = TaskBank(AutoModel.from_pretrained(self.base), tokenizer)
        for name, place in self.deltas.items():
            self.bank.add_task(name, place)

    def bank_seconds(self) -> float:
        """What the bank itself takes for all requests."""
        start = time.perf_counter()
        for first in range(0, len(self.texts), BATCH):
            names = [f"task-{number}" for number in self.numbers[first : first + BATCH]]
            self.bank.predict(self.texts[first : first + BATCH], names, batch_size=BATCH)
        return time.perf_counter() - start


@dataclass
class System:
    """A system that answers.

    Args:
        name (`str`): Its name.
        servers (`list[Running]`): Its processes.
        clients (`list[Client]`): One for each request.
    """

    name: str
    servers: list[Running]
    clients: list[Client]

    @property
    def memory(self) -> int:
        """Bytes of its processes that are in memory; on Ray only of the one that started it."""
        return sum(server.memory() or 0 for server in self.servers)


@contextmanager
def started(name: str, world: World) -> Iterator[System]:
    """A system that runs until the block ends."""
    python, deltas = [sys.executable, PEERS], [str(place) for place in world.deltas.values()]
    with ExitStack() as stack:
        if name == "merged":
            one = {"OMP_NUM_THREADS": "1"}
            servers = [stack.enter_context(running([*python, "merged", place], one)) for place in world.merged]
            each = [Client(server.url) for server in servers]
        else:
            if name == "bitfit":
                server = stack.enter_context(bitfit_serve(world.base, world.deltas))
            elif name == "ray":
                server = stack.enter_context(running([*python, "ray", world.base, *deltas]))
            else:
                server = stack.enter_context(running([*python, "multiplexed", *world.merged]))
            servers, each = [server], [Client(server.url)] * world.args.tasks
            if name == "multiplexed":
                each = [
                    Client(server.url, {"serve_multiplexed_model_id": str(number)})
                    for number in range(world.args.tasks)
                ]
        yield System(name, servers, [each[number] for number in world.numbers])


def closed(system: System, world: World) -> Outcome:
    """As much as there can be."""

    async def main() -> Outcome:
        outcome = await closed_loop(system.clients, path_of(system), world.bodies, clients=world.args.clients)
        return await _closing(system, outcome)

    return _answered(system, asyncio.run(main()))


def opened(system: System, world: World, rate: float) -> Outcome:
    """So many in a second, whether they are answered or not."""

    async def main() -> Outcome:
        outcome = await open_loop(system.clients, path_of(system), world.bodies, rate=rate, seed=world.args.seed)
        return await _closing(system, outcome)

    return _answered(system, asyncio.run(main()))


def path_of(system: System) -> str:
    return "/" if system.name == "multiplexed" else "/predict"


async def _closing(system: System, outcome: Outcome) -> Outcome:
    # Connections belong to the event loop that they were made in.
    for client in {id(one): one for one in system.clients}.values():
        await client.close()
    return outcome


def _answered(system: System, outcome: Outcome) -> Outcome:
    if not outcome.latencies:
        raise SystemExit(f"{system.name} has answered nothing: {outcome.statuses}")
    return outcome


@dataclass
class Round:
    """What one round has found.

    Args:
        throughput (`dict[str, float]`): Of each system with 32 clients, and of the bank; answers in a second.
        generator (`dict[str, float]`): Seconds of a processor that the load generator took for a request to each.
        loads (`dict[tuple[float, str], dict[str, Any]]`): Figures of an open loop, by share and system.
    """

    throughput: dict[str, float]
    generator: dict[str, float] = field(default_factory=dict)
    loads: dict[tuple[float, str], dict[str, Any]] = field(default_factory=dict)


def group(names: Sequence[str], world: World, console: Console) -> dict[str, Any]:
    """Measures systems that run at the same time."""
    with ExitStack() as stack:
        systems = [stack.enter_context(started(name, world)) for name in names]
        for system in systems:
            closed(system, world)  # everything is loaded and warm
        world.bank_seconds()
        gc.collect()
        gc.freeze()  # `late_p99` is of the load generator, not of a collection that halts it
        rounds = [
            one_round(systems if number % 2 else systems[::-1], world, console) for number in range(world.args.rounds)
        ]
        memory = {system.name: system.memory for system in systems}
    saturated = {name: most_of(name, rounds) for name in rounds[0].throughput}
    return {
        "systems": list(names),
        "saturated": saturated,
        "batch_seconds": BATCH / saturated["bank"]["throughput"],
        "open_loop": [
            {"system": name, "share": share} | load_of(found)
            for share in sorted(world.args.shares)
            for name in names
            if (found := [one.loads[share, name] for one in rounds if (share, name) in one.loads])
        ],
        "memory": memory,
    }


def one_round(systems: Sequence[System], world: World, console: Console) -> Round:
    """The bank and each system with all that can be, then each with each load."""
    found = Round({"bank": world.args.requests / world.bank_seconds()})
    for system in systems:
        outcome = closed(system, world)
        found.throughput[system.name] = outcome.throughput
        found.generator[system.name] = outcome.figures()["generator_seconds_per_request"]
    console.print({name: round(value, 1) for name, value in found.throughput.items()})
    behind: set[str] = set()  # of the load before; with a larger one they would only be further behind
    for share in sorted(world.args.shares):
        for system in systems:
            if system.name in behind:
                continue
            rate = share * found.throughput["bitfit"]
            figures = opened(system, world, rate).figures()
            figures |= {"rate": rate, "p99_in_batches": figures["p99"] * found.throughput["bank"] / BATCH}
            found.loads[share, system.name] = figures
            if figures["throughput"] < _KEPT_UP * rate:
                behind.add(system.name)
            console.print(f"{system.name} {share:.1f}: p50 {figures['p50']:.3f} s, p99 {figures['p99']:.3f} s")
    return found


def most_of(name: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """All that a system can do: the medians of the rounds, ratios with their quartiles."""
    own = [one.throughput[name] for one in rounds]
    return {
        "throughput": statistics.median(own),
        "of_bank": ratios(own, [one.throughput["bank"] for one in rounds]),
        "bitfit_is_faster_by": ratios([one.throughput["bitfit"] for one in rounds], own),
        "generator_seconds_per_request": statistics.median(one.generator.get(name, 0.0) for one in rounds),
    }


def load_of(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An open loop as the median of its rounds; `p99_in_batches` with its quartiles, and statuses in all."""
    row: dict[str, Any] = {
        name: statistics.median(one[name] for one in figures)
        for name in ("rate", "throughput", "p50", "p99", "late_p99", "generator_seconds_per_request")
    }
    row["p99_in_batches"] = quartiles([one["p99_in_batches"] for one in figures])
    row["statuses"] = dict(sum((Counter(one["statuses"]) for one in figures), Counter()))
    return row


def show(record: dict[str, Any], console: Console) -> None:
    """Prints the figures as tables."""
    for one in record["groups"]:
        table = Table(title="32 clients, each waiting for its answer")
        for heading in ("system", "per s", "of the bank", "bitfit faster by", "generator µs", "memory MB"):
            table.add_column(heading, justify="left" if heading == "system" else "right")
        for name, row in one["saturated"].items():
            faster = row["bitfit_is_faster_by"]
            table.add_row(
                name,
                f"{row['throughput']:.0f}",
                f"{row['of_bank']['median']:.2f} ({row['of_bank']['low']:.2f}-{row['of_bank']['high']:.2f})",
                f"{faster['median']:.2f} ({faster['low']:.2f}-{faster['high']:.2f})",
                f"{1e6 * row['generator_seconds_per_request']:.0f}",
                f"{one['memory'].get(name, 0) / 1e6:.0f}",
            )
        console.print(table)
        table = Table(title=f"Open loop; a batch of {BATCH} takes the bank {1000 * one['batch_seconds']:.0f} ms")
        for heading in ("system", "share", "arriving", "answered", "p50 ms", "p99 ms", "p99 in batches", "late ms"):
            table.add_column(heading, justify="left" if heading == "system" else "right")
        for row in one["open_loop"]:
            table.add_row(
                row["system"],
                f"{row['share']:.2f}",
                f"{row['rate']:.0f}",
                f"{row['throughput']:.0f}",
                f"{1000 * row['p50']:.0f}",
                f"{1000 * row['p99']:.0f}",
                f"{row['p99_in_batches']['median']:.1f}",
                f"{1000 * row['late_p99']:.1f}",
            )
        console.print(table)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draws the latencies over the load."""
    from matplotlib.figure import Figure

    labels = {"bitfit": "bitfit serve", "merged": "a server per task (merged)", "ray": "bitfit on Ray Serve"}
    labels["multiplexed"] = "Ray Serve, multiplexed"
    groups = record["groups"]
    figure = Figure(figsize=(5 * len(groups), 3.8), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups):
        for name in one["systems"]:
            rows = [row for row in one["open_loop"] if row["system"] == name]
            rates = [row["rate"] for row in rows]
            color = f"C{list(labels).index(name)}"
            axes.plot(rates, [1000 * row["p99"] for row in rows], color=color, marker="o", label=labels[name])
            axes.plot(rates, [1000 * row["p50"] for row in rows], color=color, marker="o", linestyle=":")
        axes.axhline(3000 * one["batch_seconds"], color="gray", linewidth=0.8)
        axes.annotate("three batches of 32", (0, 3000 * one["batch_seconds"]), va="bottom", color="gray", fontsize=8)
        axes.set(yscale="log", xlim=(0, None), xlabel="requests arriving per second")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("ms: 99 of 100 (line), half (dots)")
    tasks = record["arguments"]["tasks"]
    figure.suptitle(f"{tasks} tasks over HTTP on {record['hardware']['cores']} cores, load generator included")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (args,) = HfArgumentParser(Arguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(argv)
    unknown = set(args.systems) - {*PLAIN, *ON_RAY}
    if unknown or "bitfit" not in args.systems:
        raise SystemExit(f"--systems are bitfit and any of merged, ray, multiplexed; got {', '.join(args.systems)}.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(width=120)
    commit, dirty = checkout()  # of what runs; files may change meanwhile
    with tempfile.TemporaryDirectory() as folder:
        world = World(args, Path(folder))
        chosen = [[name for name in names if name in args.systems] for names in (PLAIN, ON_RAY)]
        groups = [group(names, world, console) for names in chosen if len(names) > 1 or names is chosen[0]]
    record = {
        "arguments": asdict(args) | {"output": None, "model": None},
        "groups": groups,
        **circumstances(commit, dirty),
    }
    show(record, console)
    write_record(record, args.output, plot)
    return record


if __name__ == "__main__":
    main()
