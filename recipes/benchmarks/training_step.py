"""What a training step costs: BitFit through the tuner against its peers, in one interleaved run.

Compared are full fine-tuning, biases unfrozen by hand (the floor: no wrapper at all), BitFit through the tuner, PEFT's
BEFT on every Linear, LayerNorm tuning, LoRA on q and v and on all Linears, and the head alone. Every system takes one
step in turn, round after round, so that a machine whose speed drifts treats all alike; medians are compared, as
ratios. The spread, half the distance between the quartiles, says what is noise.

    python recipes/benchmarks/training_step.py                                   # BERT-base shape, batch 8 x 128
    python recipes/benchmarks/training_step.py --hidden_size 384 --layers 6 --heads 12 --intermediate_size 1536

The models are random: a step's cost does not depend on the values.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import BeftConfig, LNTuningConfig, LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from bitfit_hf import BitFitConfig
from bitfit_hf.run import installed_versions


@dataclass
class Arguments:
    """Shape of the model and length of the run."""

    hidden_size: int = field(default=768, metadata={"help": "Width of the model."})
    layers: int = field(default=12, metadata={"help": "Number of layers."})
    heads: int = field(default=12, metadata={"help": "Attention heads."})
    intermediate_size: int = field(default=3072, metadata={"help": "Width of the MLP."})
    batch_size: int = field(default=8, metadata={"help": "Examples in a step."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens in an example."})
    rounds: int = field(default=15, metadata={"help": "Counted steps of each system."})
    warmup: int = field(default=2, metadata={"help": "Steps before, not counted."})
    systems: list[str] = field(default_factory=list, metadata={"help": "Only these; all by default."})
    output: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})


def stock(arguments: Arguments) -> torch.nn.Module:
    """A BERT classifier of the asked-for shape."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        intermediate_size=arguments.intermediate_size,
    )
    return BertForSequenceClassification(config).train()


def unfrozen_by_hand(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and head of the stock model, trained in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith(".bias") or name.startswith("classifier")
    return model


def head_only(model: torch.nn.Module) -> torch.nn.Module:
    """A frozen body."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("classifier")
    return model


LINEARS = ["query", "key", "value", "dense"]
SYSTEMS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "full fine-tuning": lambda model: model,
    "biases unfrozen by hand": unfrozen_by_hand,
    "BitFit": lambda model: get_peft_model(model, BitFitConfig()),
    "BEFT, all Linears": lambda model: get_peft_model(model, BeftConfig(task_type="SEQ_CLS", target_modules=LINEARS)),
    "LayerNorm tuning": lambda model: get_peft_model(
        model, LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])
    ),
    "LoRA r=8, q and v": lambda model: get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    ),
    "LoRA r=8, all Linears": lambda model: get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=LINEARS)
    ),
    "head only": head_only,
}
REFERENCE = "biases unfrozen by hand"


class System:
    """One model with its optimizer, ready to take steps."""

    def __init__(self, name: str, arguments: Arguments) -> None:
        self.name = name
        self.model = SYSTEMS[name](stock(arguments))
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4)
        self.seconds: list[float] = []

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Forward, backward and update; returns seconds."""
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def kept_bytes(self, batch: dict[str, torch.Tensor]) -> int:
        """Bytes that the forward pass keeps for the backward pass, beside the parameters; each storage once."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**batch).loss
        del loss
        return sum(kept.values())


def measure(arguments: Arguments) -> list[dict[str, float | int | str]]:
    """Takes the steps, round after round, and summarises them."""
    batch = {
        "input_ids": torch.randint(1000, 20000, (arguments.batch_size, arguments.sequence_length)),
        "labels": torch.randint(0, 2, (arguments.batch_size,)),
    }
    systems = [System(name, arguments) for name in arguments.systems or SYSTEMS]
    for turn in range(arguments.warmup + arguments.rounds):
        # Every other round the other way round, so that no system always follows the same one.
        for system in systems if turn % 2 else reversed(systems):
            seconds = system.step(batch)
            if turn >= arguments.warmup:
                system.seconds.append(seconds)
    reference = next((system for system in systems if system.name == REFERENCE), systems[0])
    rows: list[dict[str, float | int | str]] = []
    for system in systems:
        # The ratio of each round's pair cancels what the machine did in that round.
        ratios = [a / b for a, b in zip(system.seconds, reference.seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        rows.append(
            {
                "system": system.name,
                "trainable": sum(parameter.numel() for parameter in system.trainable),
                "seconds": statistics.median(system.seconds),
                "ratio": statistics.median(ratios),
                "spread": (high - low) / 2,
                "kept_bytes": system.kept_bytes(batch),
                "gradient_bytes": sum(parameter.numel() * parameter.element_size() for parameter in system.trainable),
            }
        )
    return rows


def show(rows: list[dict[str, float | int | str]]) -> None:
    """Prints the figures as a table."""
    table = Table(title="One training step")
    for heading in ("system", "trainable", f"time / {REFERENCE}", "spread", "kept for backward"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for row in rows:
        kept = f"{row['kept_bytes'] / 2**20:.0f} MiB"  # type: ignore[operator]
        table.add_row(
            str(row["system"]), f"{row['trainable']:,}", f"{row['ratio']:.3f}", f"± {row['spread']:.3f}", kept
        )
    Console().print(table)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    rows = measure(arguments)
    show(rows)
    if arguments.output:
        record = {
            "arguments": asdict(arguments),
            "rows": rows,
            "versions": installed_versions(),
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        }
        Path(arguments.output).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
