"""What a private step costs: against the same step without privacy, and against Opacus on the same parameters.

    python recipes/benchmarks/private.py                              # MiniLM's and BERT-base's shape
    python recipes/benchmarks/private.py --shapes minilm --rounds 60
    python recipes/benchmarks/private.py --render_only

The systems take their steps in turn: BitFit without privacy; BitFit with per-example clipping and noise, as
`PrivateTrainer` computes it; and `opacus.PrivacyEngine` on the biases and the head of the stock model, unfrozen by
hand. On a CPU a step's time is the processor time of the process, which others disturb less. *Kept* is what the
forward pass leaves in memory for the backward pass. All three have the same optimizer and batch, the two private ones
the same clip, noise and sampling rate, and so the same ε, which is computed on both sides.

Each shape gives one JSON file in `recipes/benchmarks/results/`, `private.md` beside them shows all that are there.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the recipes are found beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from common.arguments import parse
from common.record import checkout, hardware, versions
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.kept import kept_bytes
from benchmarks.report import size
from benchmarks.systems import SHAPES, Shape, bitfit, by_hand, num_trainable, tiny
from benchmarks.timing import compare, interleave
from bitfit_hf import PrivacyConfig
from bitfit_hf.storage.files import write_bytes
from bitfit_hf.trainer.parameter_groups import trainable_deltas, trainable_head
from bitfit_hf.trainer.private.gradients import PrivateSum
from bitfit_hf.trainer.private.ledger import Ledger
from bitfit_hf.trainer.private.study import study_batch
from bitfit_hf.tuner.per_example import PerExample

RESULTS = Path(__file__).parent / "results"
PLAIN, PRIVATE, OPACUS = "BitFit", "BitFit, private", "Opacus, biases unfrozen by hand"
EXAMPLES, CLIP, STEPS, EPSILON = 10_000, 0.1, 500, 3.0


@dataclass
class Arguments:
    """What to measure, and how long."""

    shapes: list[str] = field(
        default_factory=lambda: ["minilm", "bert-base"], metadata={"help": f"Among {', '.join(SHAPES)}."}
    )
    rounds: int = field(default=40, metadata={"help": "Counted steps of each system."})
    warmup: int = field(default=3, metadata={"help": "Steps before, not counted."})
    device: str | None = field(default=None, metadata={"help": "'cpu' or 'cuda'; by default the GPU if there is one."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Where the results go."})
    overwrite: bool = field(default=False, metadata={"help": "Measure shapes again whose result is there."})
    render_only: bool = field(default=False, metadata={"help": "Write Markdown of what is there."})
    tiny: bool = field(default=False, metadata={"help": "Models of toy size, to try the script."})


class System:
    """A model with its optimizer, ready to take steps on one batch.

    Args:
        model (`nn.Module`): The model.
        batch (`Mapping[str, torch.Tensor]`): With labels.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
        self.model, self.batch = model.train(), batch
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(self.trained, lr=1e-4)

    def forward(self, **batch: torch.Tensor) -> Any:
        """The forward pass, also of [`kept_bytes`]."""
        return self.model(**batch)

    def step(self) -> None:
        """Forward, backward and update."""
        self.forward(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> float:
        """A step; returns seconds."""
        on_gpu = self.trained[0].device.type == "cuda"
        clock = time.perf_counter if on_gpu else time.process_time
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        self.step()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start

    def kept(self) -> int:
        """Bytes that a forward pass leaves for the backward pass."""
        return kept_bytes(_Forward(self), self.batch)

    def epsilon(self, steps: int) -> float | None:
        """What so many steps spend."""
        return None


class _Forward(nn.Module):
    def __init__(self, system: System) -> None:
        super().__init__()
        self.model, self._system = system.model, (system,)

    def forward(self, **batch: torch.Tensor) -> Any:
        return self._system[0].forward(**batch)


class Private(System):
    """What `PrivateTrainer` does with a batch and at the end of an update."""

    def __init__(self, model: nn.Module, batch: Mapping[str, torch.Tensor], noise: float) -> None:
        super().__init__(model, batch)
        decayed, plain = trainable_head(model)
        self._sum = PrivateSum(list((trainable_deltas(model) | decayed | plain).values()), CLIP)
        self._studied = study_batch(model, batch)
        self._count = len(batch["labels"])
        self.ledger = Ledger(PrivacyConfig(noise_multiplier=noise, max_grad_norm=CLIP), EXAMPLES, self._count)

    def forward(self, **batch: torch.Tensor) -> Any:
        with PerExample(self.model, self._count, self._studied.rows):
            return self.model(**batch)

    def step(self) -> None:
        with PerExample(self.model, self._count, self._studied.rows) as tape:
            self.model(**self.batch).loss.backward()
        self._sum.add(tape.gradients, self._studied.scale(self.batch["labels"]))
        assert self.ledger.noise_multiplier is not None
        self._sum.release(self.ledger.noise_multiplier, self.ledger.noise, self._count)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epsilon(self, steps: int) -> float | None:
        return self.ledger.facts(ahead=steps)["epsilon"]


class Opacus(System):
    """Opacus' hooks on the stock model, and its optimizer."""

    def __init__(self, model: nn.Module, batch: Mapping[str, torch.Tensor], noise: float) -> None:
        super().__init__(model, batch)
        self._engine = PrivacyEngine(accountant="prv")
        data = DataLoader(TensorDataset(torch.zeros(EXAMPLES, 1)), batch_size=len(batch["labels"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model, self.optimizer, data = self._engine.make_private(
                module=self.model,
                optimizer=self.optimizer,
                data_loader=data,
                noise_multiplier=noise,
                max_grad_norm=CLIP,
            )
        self._rate = data.sample_rate
        self._noise = noise

    def epsilon(self, steps: int) -> float | None:
        self._engine.accountant.history = [(self._noise, self._rate, steps)]
        found = self._engine.get_epsilon(delta=1 / (10 * EXAMPLES))
        self._engine.accountant.history = []
        return float(found)


def systems(shape: Shape, device: torch.device) -> dict[str, System]:
    """All three, with equal weights, batch, clip and noise."""
    batch = shape.batch(device)
    noise = get_noise_multiplier(
        target_epsilon=EPSILON,
        target_delta=1 / (10 * EXAMPLES),
        sample_rate=shape.batch_size / EXAMPLES,
        steps=STEPS,
        accountant="prv",
    )
    made = {
        PLAIN: System(bitfit(shape.build(), shape).to(device), batch),
        PRIVATE: Private(bitfit(shape.build(), shape).to(device).train(), batch, noise),
        OPACUS: Opacus(by_hand(shape.build(), shape).to(device), batch, noise),
    }
    counts = {num_trainable(system.model) for system in made.values()}
    if len(counts) > 1:
        raise RuntimeError(f"The systems train {counts} parameters and cannot be compared.")
    return made


def measure(name: str, shape: Shape, arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """Measures one shape."""
    made = systems(shape, device)
    turns: dict[str, Callable[[], float]] = {key: system.timed for key, system in made.items()}
    times = interleave(turns, rounds=arguments.rounds, warmup=arguments.warmup)
    plain = made[PLAIN].kept()
    rows = []
    for key, system in made.items():
        kept = system.kept()
        rows.append(
            {
                "system": key,
                **compare(times[key], times[PLAIN]),
                "kept_bytes": kept,
                "kept_ratio": kept / plain,
                "epsilon": system.epsilon(STEPS),
                "all_seconds": times[key],
            }
        )
    commit, dirty = checkout()
    return {
        "shape": name,
        "device": device.type,
        "clock": "wall" if device.type == "cuda" else "processor",
        "model": asdict(shape),
        "trainable": num_trainable(made[PLAIN].model),
        "rounds": arguments.rounds,
        "steps": STEPS,
        "delta": 1 / (10 * EXAMPLES),
        "rows": rows,
        "hardware": hardware(1, device),
        "versions": versions() | {"opacus": metadata.version("opacus")},
        "commit": commit,
        "dirty": dirty,
    }


_INTRODUCTION = f"""# What a private step costs

Made by `recipes/benchmarks/private.py` from the JSON files beside this page; do not edit. *Time* is the median over
the rounds of a system's step time divided by that of *{PLAIN}* in the same round; ± is half the distance between the
quartiles. *Kept* is what the forward pass leaves in memory for the backward pass. ε is what {STEPS} such steps spend
on {EXAMPLES:,} examples with δ = 1 / (10 n), by Opacus' PRV accountant.
"""


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """All results as a page with one table each."""
    parts = [_INTRODUCTION]
    for result in results:
        shape = result["model"]
        commit = (result["commit"] or "unknown")[:12] + (" with changes" if result["dirty"] else "")
        parts.append(f"## {result['shape']} on {result['hardware']['device']}\n")
        parts.append(
            f"{shape['layers']} layers x {shape['hidden_size']}, batch {shape['batch_size']} x {shape['length']}, "
            f"{result['trainable']:,} parameters trained, {result['rounds']} rounds of {result['clock']} time; "
            f"{result['hardware']['cpu']}, {result['hardware']['threads']} threads; "
            f"torch {result['versions']['torch']}, opacus {result['versions']['opacus']}; commit {commit}.\n"
        )
        lines = ["| system | time | ± | kept | kept / plain | ε |", "|---|---:|---:|---:|---:|---:|"]
        lines += [
            f"| {row['system']} | {row['ratio']:.2f} | {row['spread']:.2f} | {size(row['kept_bytes'])} "
            f"| {row['kept_ratio']:.2f} | {'' if row['epsilon'] is None else format(row['epsilon'], '.3f')} |"
            for row in result["rows"]
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Measures what is missing, writes it, and the page of all that is there."""
    unknown = [name for name in arguments.shapes if name not in SHAPES]
    if unknown:
        raise SystemExit(f"--shapes: {unknown} are not known; choose among {list(SHAPES)}.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(arguments.results_dir)
    for name in () if arguments.render_only else arguments.shapes:
        path = folder / f"private-{name}-{device.type}.json"
        if path.exists() and not arguments.overwrite:
            continue
        shape = tiny(SHAPES[name]) if arguments.tiny else SHAPES[name]
        result = measure(name, shape, arguments, device)
        write_bytes(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        for row in result["rows"]:
            print(f"{name}, {row['system']}: time {row['ratio']:.2f}, kept {row['kept_ratio']:.2f}", flush=True)
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("private-*.json"))]
    write_bytes(folder / "private.md", markdown(results).encode())
    return results


def main(argv: list[str] | None = None) -> None:
    run(parse(Arguments, argv, description=(__doc__ or "").splitlines()[0]))


if __name__ == "__main__":
    main()
