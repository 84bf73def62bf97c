"""Serving many tasks on one base: `TaskBank` against the plain base and the two usual ways, in one interleaved run.

Each example of a batch is of a random one of 1, 10, 100 or 1,000 resident tasks. Compared are

- `base`: the plain base model, one head for all: what a forward pass costs without any tasks;
- `bank`: `TaskBank`, every example with its own task's deltas and head;
- `merged`: one merged model per task, called in turn on its part of the batch. There are `--merged_models` of them, as
  many as fit and enough that the tasks of a batch do not find each other's weights in the cache; further tasks share;
- `lora`: PEFT, LoRA r=8 on query and value with a head each, and `adapter_names`. Its adapters are registered layer by
  layer: what they take in a forward pass is the same, and the time of `add_adapter` grows faster than the square of
  their number.

Every system answers the same batch in turn, round after round, each round in another order, so that a machine whose
speed drifts treats all alike. What is compared is the ratio of two systems within a round: its median, and its
quartiles as the spread. Beside the clock on the wall the processor's time is taken, which is the steadier of the two
on a machine that others use. Weights are a real MiniLM's, deltas and ids random: the cost does not depend on values.

    python recipes/benchmarks/serving.py                                   # all figures
    python recipes/benchmarks/serving.py --tasks 1 100 --shapes 32x64 --rounds 5 --bert_tasks 0
    python recipes/benchmarks/serving.py --output recipes/benchmarks/results/serve.json
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the recipes are found beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from common.record import checkout
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from quickstart import DEMO_PACKAGE, demo_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
)
from transformers.utils import logging

from benchmarks.mixed import time_in_turn
from benchmarks.records import circumstances, write_record
from benchmarks.timing import ratios
from bitfit_hf import BiasDelta, BitFitConfig, TaskBank


@dataclass
class Arguments:
    """Sizes of the run."""

    tasks: list[int] = field(default_factory=lambda: [1, 10, 100, 1000], metadata={"help": "Numbers of tasks."})
    shapes: list[str] = field(
        default_factory=lambda: ["1x16", "32x16", "32x64", "128x16"], metadata={"help": "Batches: examples x tokens."}
    )
    rounds: int = field(default=11, metadata={"help": "Counted batches of each system."})
    warmup: int = field(default=2, metadata={"help": "Batches before, not counted."})
    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 leaves its default."})
    merged_models: int = field(default=32, metadata={"help": "Merged models; each takes the memory of the base."})
    bert_tasks: int = field(default=1000, metadata={"help": "Tasks for the memory of a BERT-base; 0 leaves it out."})
    model: str | None = field(default=None, metadata={"help": "A BERT instead of the MiniLM of the demo package."})
    output: str | None = field(default=None, metadata={"help": "A JSON file; a plot is drawn beside it."})


# --- systems ---


# As on a base whose pooler is trained, such as BERT. On MiniLM, whose is not, it would be a part of each head, six
# times as large as all biases.
TASK = BitFitConfig(train_untrained_pooler=False)


def random_delta(template: BiasDelta, seed: int) -> BiasDelta:
    """A delta like `template` with random values."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensors: Any) -> dict[str, torch.Tensor]:
        return {name: 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}

    return BiasDelta(drawn(template), config=template.config, head=drawn(template.head))


class Systems:
    """All systems on one base, with some number of tasks each."""

    def __init__(self, name: str, merged_models: int) -> None:
        load = AutoModelForSequenceClassification.from_pretrained
        self.base = load(name, num_labels=2).eval()
        self.template = BiasDelta.from_model(get_peft_model(load(name, num_labels=2), TASK))
        self.bank = TaskBank(AutoModel.from_pretrained(name))
        self.merged: list[torch.nn.Module] = []
        self.merged_models = merged_models
        self.lora_config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
        self.lora = get_peft_model(load(name, num_labels=2), self.lora_config, adapter_name="task-0").eval()

    def grow(self, count: int) -> None:
        """Adds tasks up to `count`."""
        for number in track(range(len(self.bank), count), description="tasks", transient=True):
            delta = random_delta(self.template, number)
            self.bank.add_task(f"task-{number}", delta)
            if number < self.merged_models:
                self.merged.append(delta.apply_(copy.deepcopy(self.base)))
            if number:
                self._register_lora(f"task-{number}")
        self.lora.eval()

    def _register_lora(self, name: str) -> None:
        self.lora.peft_config[name] = self.lora_config
        for module in self._wrapped_by_lora():
            if isinstance(module, LoraLayer):
                module.update_layer(name, r=8, lora_alpha=self.lora_config.lora_alpha, config=self.lora_config)
            else:
                module.update(name)

    def _wrapped_by_lora(self) -> list[Any]:
        if not hasattr(self, "_lora_modules"):
            kinds = (LoraLayer, ModulesToSaveWrapper)
            self._lora_modules = [module for module in self.lora.modules() if isinstance(module, kinds)]
        return self._lora_modules

    @property
    def runners(self) -> dict[str, Callable[[dict[str, torch.Tensor], Sequence[str]], Any]]:
        """How each system answers a batch, given the name of each example's task."""
        return {
            "base": lambda batch, names: self.base(**batch),
            "bank": lambda batch, names: self.bank(**batch, tasks=names),
            "merged": self._in_turn,
            "lora": lambda batch, names: self.lora(**batch, adapter_names=list(names)),
        }

    def _in_turn(self, batch: dict[str, torch.Tensor], names: Sequence[str]) -> None:
        for turn, name in enumerate(dict.fromkeys(names)):
            rows = [i for i, other in enumerate(names) if other == name]
            self.merged[turn % len(self.merged)](**{key: value[rows] for key, value in batch.items()})


# --- measuring ---


def throughput(systems: Systems, arguments: Arguments, count: int, shape: str) -> list[dict[str, Any]]:
    """Times one number of tasks and one shape of batch."""
    batch_size, length = map(int, shape.split("x"))
    repeats = {"rounds": arguments.rounds, "warmup": arguments.warmup}
    turns = time_in_turn(systems.runners, count, batch_size, length, **repeats)
    return [
        {
            "system": name,
            "tasks": count,
            "batch_size": batch_size,
            "sequence_length": length,
            "distinct_tasks_per_batch": statistics.mean(turns.distinct),
            "seconds_median": statistics.median(turns.wall[name]),
            "seconds_p90": sorted(turns.wall[name])[int(0.9 * (len(turns.wall[name]) - 1))],
            "examples_per_second": batch_size / statistics.median(turns.wall[name]),
            "throughput_of_base": ratios(turns.wall["base"], turns.wall[name]),
            "throughput_of_base_processor": ratios(turns.processor["base"], turns.processor[name]),
            "bank_is_faster_by": ratios(turns.wall[name], turns.wall["bank"]),
            "bank_is_faster_by_processor": ratios(turns.processor[name], turns.processor["bank"]),
        }
        for name in systems.runners
    ]


def adding(systems: Systems, count: int) -> dict[str, Any]:
    """Seconds that reading a task from disk takes, and adding what was read, for each of `count` in a fresh bank."""
    bank = TaskBank(systems.base)
    seconds: dict[str, list[float]] = {name: [] for name in ("reading", "adding", "adding_processor")}
    with tempfile.TemporaryDirectory() as folder:
        random_delta(systems.template, 0).save_pretrained(folder)
        for number in track(range(count), description="adding", transient=True):
            start = time.perf_counter()
            delta = BiasDelta.from_pretrained(folder)
            middle, processor = time.perf_counter(), time.process_time()
            bank.add_task(f"task-{number}", delta)
            seconds["adding_processor"].append(time.process_time() - processor)
            seconds["adding"].append(time.perf_counter() - middle)
            seconds["reading"].append(middle - start)
    part = max(1, count // 20)
    return {"tasks": count} | {
        name: {
            "first": values[0],
            "early_median": statistics.median(values[1 : part + 1] or values),
            "late_median": statistics.median(values[-part:]),
            "max": max(values),
        }
        for name, values in seconds.items()
    }


def memory(bank: TaskBank) -> dict[str, float]:
    """Bytes of a bank's tasks, all and each."""
    found = bank.memory()
    return {**found, "count": len(bank), "bytes_per_task": found["tasks"] / max(1, len(bank))}


def resident_bytes() -> int | None:
    """Memory of this process, where the system tells it in the way of Linux."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def bert_memory(count: int, dtype: torch.dtype) -> dict[str, Any]:
    """Memory of `count` tasks on a random model of BERT-base's size, counted and as the process sees it."""
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig()).eval()
    delta = BiasDelta.from_model(get_peft_model(BertForSequenceClassification(BertConfig()), BitFitConfig()))
    delta.config.base_fingerprint = None  # of another random model
    bank = TaskBank(base, dtype=dtype)
    before = resident_bytes()
    for number in track(range(count), description=f"BERT-base tasks, {dtype}", transient=True):
        bank.add_task(f"task-{number}", delta, on_base_mismatch="ignore")
    after = resident_bytes()
    grown = None if before is None or after is None else after - before
    return {"dtype": str(dtype).removeprefix("torch."), **memory(bank), "process_grew_by": grown}


# --- showing ---


def show(record: dict[str, Any]) -> None:
    """Prints the figures as tables."""
    table = Table(title="One batch: throughput as a share of the plain base, median and quartiles")
    for heading in ("system", "tasks", "batch", "distinct", "per s", "p90 ms", "of base", "quartiles", "processor"):
        table.add_column(heading, justify="left" if heading == "system" else "right", no_wrap=True)
    table.add_column("bank faster", justify="right", no_wrap=True)
    for row in record["throughput"]:
        share = row["throughput_of_base"]
        table.add_row(
            row["system"],
            f"{row['tasks']:,}",
            f"{row['batch_size']} x {row['sequence_length']}",
            f"{row['distinct_tasks_per_batch']:.1f}",
            f"{row['examples_per_second']:.1f}",
            f"{1000 * row['seconds_p90']:.0f}",
            f"{share['median']:.3f}",
            f"{share['low']:.2f}-{share['high']:.2f}",
            f"{row['throughput_of_base_processor']['median']:.3f}",
            f"{row['bank_is_faster_by']['median']:.2f} x",
        )
    console = Console(width=120)
    console.print(table)
    for name, values in record["adding"].items():
        if name != "tasks":
            shown = ", ".join(f"{key} {1000 * value:.1f} ms" for key, value in values.items())
            console.print(f"{name}: {shown}")
    for row in record["memory"]:
        console.print(
            f"{row['model']}, {row['dtype']}: {row['count']} tasks take {row['tasks'] / 1e6:.1f} MB "
            f"({row['reserved'] / 1e6:.1f} MB of tables), {row['bytes_per_task'] / 1e3:.1f} kB each, "
            f"beside {row['base'] / 1e6:.0f} MB"
        )


def plot(record: dict[str, Any], path: Path) -> None:
    """Draws the throughput over the number of tasks."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row["batch_size"], row["sequence_length"]) for row in record["throughput"]))
    shapes = [shape for shape in shapes if shape[0] > 1]
    figure = Figure(figsize=(4 * len(shapes), 3.6), layout="constrained")
    names = {"base": "plain base", "bank": "TaskBank", "merged": "a merged model per task", "lora": "LoRA r=8 (PEFT)"}
    for axes, (size, length) in zip(figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0], shapes):
        for system, label in names.items():
            rows = [
                row
                for row in record["throughput"]
                if (row["system"], row["batch_size"], row["sequence_length"]) == (system, size, length)
            ]
            tasks = [row["tasks"] for row in rows]
            share = {key: [row["throughput_of_base"][key] for row in rows] for key in ("median", "low", "high")}
            axes.plot(tasks, share["median"], marker="o", label=label)
            axes.fill_between(tasks, share["low"], share["high"], alpha=0.2)
        axes.set(xscale="log", ylim=(0, None), xlabel="resident tasks", title=f"{size} examples of {length} tokens")
    figure.axes[0].set_ylabel("throughput / plain base")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    commit, dirty = checkout()  # of what runs; files may change meanwhile
    systems = Systems(arguments.model or demo_model(), arguments.merged_models)
    rows = []
    for count in sorted(arguments.tasks):
        systems.grow(count)
        for shape in arguments.shapes:
            rows += throughput(systems, arguments, count, shape)
    sizes = [{"model": arguments.model or DEMO_PACKAGE, "dtype": "float32", **memory(systems.bank)}]
    record: dict[str, Any] = {
        "arguments": asdict(arguments) | {"output": None},  # results are shared, and paths are the user's own
        "throughput": rows,
        "adding": adding(systems, max(arguments.tasks)),
        "memory": sizes,
        **circumstances(commit, dirty),
    }
    if arguments.bert_tasks:
        del systems
        sizes += [
            {"model": "BERT-base shape", **bert_memory(arguments.bert_tasks, dtype)}
            for dtype in (torch.float32, torch.bfloat16)
        ]
    show(record)
    write_record(record, arguments.output, plot)
    return record


if __name__ == "__main__":
    main()
