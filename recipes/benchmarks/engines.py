"""The engines of a `TaskBank`: torch, ONNX Runtime and ONNX Runtime with int8 weights, in one run.

Each example of a batch is of a random one of 1, 100, 1,000 or 10,000 resident tasks. For each engine the bank is held
against the plain base on the same engine: one classifier without any tasks, exported by the same exporter and run with
the same options, head and all. So `bank / plain` says what the tasks cost, and `torch / onnxruntime` what an engine is
worth. Both are ratios within a round, of the clock's and of the processor's time, see `serving.py`.

With `--sst2 FOLDER` (of GLUE's files, see `common/data.py`), a task is trained for a few minutes, and the int8 graph's
answers to the development set are held against the float32 graph's and torch's: accuracy of each, and on how many
sentences they agree.

    python recipes/benchmarks/engines.py                                   # all figures
    python recipes/benchmarks/engines.py --tasks 1 100 --shapes 32x16 --rounds 5
    python recipes/benchmarks/engines.py --output recipes/benchmarks/results/engines.json
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the recipes are found beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import onnxruntime
import torch
from common.data import load_glue, subset
from common.record import checkout
from peft import get_peft_model
from quickstart import demo_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from transformers.utils import logging

from benchmarks.mixed import time_in_turn
from benchmarks.records import circumstances, write_record
from benchmarks.serving import TASK, memory, random_delta
from benchmarks.timing import ratios
from bitfit_hf import BiasDelta, BitFitCallback, TaskBank, export_onnx
from bitfit_hf.bank.onnx.folder import GRAPH_FILE
from bitfit_hf.bank.onnx.quantize import example_of, quantize, quantized_copy
from bitfit_hf.bank.onnx.session import open_session
from bitfit_hf.bank.onnx.tracing import trace

ENGINES = ("torch", "onnxruntime", "int8", "int8-all")
Answering = Callable[[dict[str, torch.Tensor], Sequence[str]], Any]


@dataclass
class Arguments:
    """Sizes of the run."""

    tasks: list[int] = field(default_factory=lambda: [1, 100, 1000, 10000], metadata={"help": "Numbers of tasks."})
    shapes: list[str] = field(
        default_factory=lambda: ["1x16", "32x16", "32x64", "128x16"], metadata={"help": "Batches: examples x tokens."}
    )
    rounds: int = field(default=21, metadata={"help": "Counted batches of each system."})
    warmup: int = field(default=2, metadata={"help": "Batches before, not counted."})
    threads: int = field(default=0, metadata={"help": "Threads of each engine; 0 leaves torch's default for both."})
    model: str | None = field(default=None, metadata={"help": "A BERT instead of the MiniLM of the demo package."})
    sst2: str | None = field(default=None, metadata={"help": "Folder of GLUE's files, for int8 on SST-2."})
    sst2_rows: int = field(default=8000, metadata={"help": "Rows to train on."})
    output: str | None = field(default=None, metadata={"help": "A JSON file; a plot is drawn beside it."})


class _Classifier(nn.Module):
    """The plain base: inputs to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class Systems:
    """A bank and the plain base on each engine."""

    def __init__(self, name: str, folder: Path) -> None:
        load = AutoModelForSequenceClassification.from_pretrained
        self.base = load(name, num_labels=2, attn_implementation="sdpa").eval()
        self.template = BiasDelta.from_model(get_peft_model(load(name, num_labels=2), TASK))
        backbone = AutoModel.from_pretrained(name)
        export_onnx(backbone, folder / "onnxruntime")
        for engine in ENGINES[2:]:
            quantized_copy(folder / "onnxruntime", folder / engine, backbone, every=engine == "int8-all")
        self.banks = {"torch": TaskBank(backbone)}
        for engine in ENGINES[1:]:
            self.banks[engine] = TaskBank(backbone, engine="onnxruntime", graph=folder / engine)
        self._plain = _plain_sessions(name, folder / "plain")

    def grow(self, count: int) -> None:
        """Adds tasks up to `count`."""
        for number in track(range(len(self.banks["torch"]), count), description="tasks", transient=True):
            delta = random_delta(self.template, number)
            for bank in self.banks.values():
                bank.add_task(f"task-{number}", delta)

    @property
    def runners(self) -> dict[str, Answering]:
        """How each system answers a batch, given the name of each example's task."""
        found: dict[str, Answering] = {"plain torch": lambda batch, names: self.base(**batch).logits}
        for engine, session in self._plain.items():
            found[f"plain {engine}"] = lambda batch, names, session=session: session.run(
                None, {name: value.numpy() for name, value in batch.items()}
            )
        for engine, bank in self.banks.items():
            found[f"bank {engine}"] = lambda batch, names, bank=bank: bank(**batch, tasks=names).logits
        return found


def _plain_sessions(name: str, folder: Path) -> dict[str, Any]:
    """The plain base as ONNX Runtime runs it, by engine: biases are constants, so the runtime may fuse them."""
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, attn_implementation="eager").eval()
    ids = torch.randint(1000, 20000, (3, 7))
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    folder.mkdir(parents=True)
    inputs = ["input_ids", "attention_mask"]
    trace(_Classifier(model), (ids, torch.ones_like(ids)), (shape, shape), inputs, ["logits"], folder)
    places = {"onnxruntime": folder}
    for engine in ENGINES[2:]:
        places[engine] = shutil.copytree(folder, folder.parent / f"plain-{engine}")
        example = example_of(model.base_model, [])
        quantize(places[engine], example, every=engine == "int8-all")
    return {engine: open_session(onnxruntime, place / GRAPH_FILE) for engine, place in places.items()}


# --- measuring ---


def measure(systems: Systems, arguments: Arguments, count: int, shape: str) -> list[dict[str, Any]]:
    """Times one number of tasks and one shape of batch."""
    batch_size, length = map(int, shape.split("x"))
    repeats = {"rounds": arguments.rounds, "warmup": arguments.warmup}
    turns = time_in_turn(systems.runners, count, batch_size, length, **repeats)
    rows = []
    for name in systems.runners:
        engine = name.partition(" ")[2]
        others = {
            "of_plain": f"plain {engine}",
            "faster_than_torch_bank": "bank torch",
            "faster_than_onnxruntime_bank": "bank onnxruntime",
        }
        row: dict[str, Any] = {
            "system": name,
            "tasks": count,
            "batch_size": batch_size,
            "sequence_length": length,
            "seconds_median": statistics.median(turns.wall[name]),
            "processor_seconds_median": statistics.median(turns.processor[name]),
        }
        for key, other in others.items():
            row[key] = ratios(turns.wall[other], turns.wall[name])
            row[f"{key}_processor"] = ratios(turns.processor[other], turns.processor[name])
        rows.append(row)
    return rows


@torch.no_grad()
def largest_difference(systems: Systems) -> dict[str, float]:
    """The largest difference of a logit between each engine's bank and the torch bank, over a mixed batch."""
    ids = torch.randint(1000, 20000, (64, 24))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = [f"task-{number % len(systems.banks['torch'])}" for number in range(64)]
    answers = {name: torch.stack(bank(**batch, tasks=names).logits) for name, bank in systems.banks.items()}
    return {name: (answer - answers["torch"]).abs().max().item() for name, answer in answers.items()}


# --- int8 on a real task ---


def sst2(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Trains a task on SST-2 and answers its development set on each engine."""
    from transformers import Trainer, TrainingArguments

    name = arguments.model or demo_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    splits = load_glue("sst2", arguments.sst2)
    train, dev = subset(splits["train"], arguments.sst2_rows), splits["validation"]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    encoded = train.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=64), batched=True)
    with tempfile.TemporaryDirectory() as scratch:
        options = TrainingArguments(
            scratch, num_train_epochs=1, learning_rate=3e-3, per_device_train_batch_size=32, save_strategy="no",
            report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            model, options, train_dataset=encoded, processing_class=tokenizer, callbacks=[BitFitCallback()]
        )
        trainer.train()
    delta = BiasDelta.from_model(model)
    backbone = AutoModel.from_pretrained(name)
    sentences, labels = list(dev["sentence"]), list(dev["label"])
    answers: dict[str, list[int]] = {}
    for engine in ENGINES:
        where: dict[str, Any] = {} if engine == "torch" else {"engine": "onnxruntime"}
        if where:
            where["graph"] = folder / engine
        bank = TaskBank(backbone, tokenizer, **where)
        bank.add_task("sst2", delta)
        predicted = bank.predict(sentences, "sst2")
        answers[engine] = [int(one["label"].removeprefix("LABEL_")) for one in predicted]  # type: ignore[call-overload]
    return {
        "sentences": len(labels),
        "trained_on": len(train),
        **{
            engine: {
                "accuracy": statistics.mean(a == b for a, b in zip(given, labels, strict=True)),
                "agrees_with_torch": statistics.mean(a == b for a, b in zip(given, answers["torch"], strict=True)),
            }
            for engine, given in answers.items()
        },
    }


# --- showing ---


def show(record: dict[str, Any]) -> None:
    """Prints the figures as tables."""
    table = Table(title="One batch: median and quartiles of the ratios within a round; processor time in brackets")
    for heading in ("system", "tasks", "batch", "ms", "of plain", "quartiles", "x torch bank", "x onnx bank"):
        table.add_column(heading, justify="left" if heading == "system" else "right", no_wrap=True)
    for row in record["throughput"]:
        share = row["of_plain"]
        values = [
            f"{row[key]['median']:.2f} ({row[f'{key}_processor']['median']:.2f})"
            for key in ("of_plain", "faster_than_torch_bank", "faster_than_onnxruntime_bank")
        ]
        table.add_row(
            row["system"],
            f"{row['tasks']:,}",
            f"{row['batch_size']} x {row['sequence_length']}",
            f"{1000 * row['seconds_median']:.1f}",
            values[0],
            f"{share['low']:.2f}-{share['high']:.2f}",
            *values[1:],
        )
    console = Console(width=120)
    console.print(table)
    for engine, size in record["memory"].items():
        console.print(f"{engine}: {size['count']:,} tasks take {size['bytes_per_task'] / 1e3:.1f} kB each")
    for name, value in record["largest_difference"].items():
        console.print(f"largest difference of a logit from the torch bank, {name}: {value:.1e}")
    for engine in ENGINES if record["sst2"] else ():
        found = record["sst2"][engine]
        console.print(f"SST-2, {engine}: accuracy {found['accuracy']:.4f}, agrees {found['agrees_with_torch']:.4f}")


def plot(record: dict[str, Any], path: Path) -> None:
    """Draws the time of a batch over the number of tasks, a line for each engine and a dashed one for its base."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((row["batch_size"], row["sequence_length"]) for row in record["throughput"]))
    figure = Figure(figsize=(3.6 * len(shapes), 3.6), layout="constrained")
    for axes, (size, length) in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes):
        for number, engine in enumerate(ENGINES):
            for kind, style in (("bank", "o-"), ("plain", "--")):
                rows = [
                    row
                    for row in record["throughput"]
                    if (row["system"], row["batch_size"], row["sequence_length"]) == (f"{kind} {engine}", size, length)
                ]
                times = [1000 * row["seconds_median"] for row in rows]
                label = f"{engine}, {'tasks mixed' if kind == 'bank' else 'plain base'}"
                axes.plot([row["tasks"] for row in rows], times, style, color=f"C{number}", label=label)
        axes.set(xscale="log", ylim=(0, None), xlabel="resident tasks", title=f"{size} examples of {length} tokens")
    figure.axes[0].set_ylabel("ms per batch")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="engines-") as name:
        yield Path(name)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    commit, dirty = checkout()  # of what runs; files may change meanwhile
    with _folder() as folder:
        systems = Systems(arguments.model or demo_model(), folder)
        rows = []
        for count in sorted(arguments.tasks):
            systems.grow(count)
            for shape in arguments.shapes:
                rows += measure(systems, arguments, count, shape)
        record: dict[str, Any] = {
            # Results are shared, and paths are the user's own.
            "arguments": asdict(arguments) | {"output": None, "sst2": bool(arguments.sst2)},
            "throughput": rows,
            "memory": {engine: memory(bank) for engine, bank in systems.banks.items()},
            "largest_difference": largest_difference(systems),
            "sst2": sst2(arguments, folder) if arguments.sst2 else None,
            **circumstances(commit, dirty),
        }
        record["versions"]["onnxruntime"] = onnxruntime.__version__
    show(record)
    write_record(record, arguments.output, plot)
    return record


if __name__ == "__main__":
    main()
