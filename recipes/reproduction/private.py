"""What privacy costs in accuracy: SST-2 and parts of speech on two models, with ε = 3 and 8 and without privacy.

    python recipes/reproduction/private.py --data_dir path/to/data                      # what is missing, in order
    python recipes/reproduction/private.py --data_dir path/to/data --parts search        # the rates, on one seed
    python recipes/reproduction/private.py --data_dir path/to/data --mpnet path/to/all-mpnet-base-v2 --parts mpnet
    python recipes/reproduction/private.py --render_only

SST-2 and the English Web Treebank are taken since a private run needs rows, which share the noise: they have 67,349
and 12,544 for training, MRPC 3,668 and RTE 2,490. δ is 1 / (10 n). Runs are by `recipes/private.py`, each evaluated
once, at its end. Rates are chosen on seed 0 of SST-2 on MiniLM alone, by the validation rows, and that choice is in no
ε.

Each run is a line in `recipes/reproduction/results/private.jsonl`, with its settings, figures, versions and commit;
one that is there is not run again, so the study can be broken off at any moment. `private.md` beside it shows all.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the recipes are found beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import private
import transformers
from common.arguments import parse
from common.record import RunRecord

from bitfit_hf.storage.files import write_bytes

RESULTS = Path(__file__).parent / "results"
MINILM, MPNET = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
TASKS = {"sst2": "SST-2", "pos": "POS (EWT)"}
EPSILONS = (3.0, 8.0, None)
SEEDS = (0, 1, 2)
PARTS = ("search", "minilm", "mpnet")
# What both ways share: so many examples are computed, whatever the batch.
EXAMPLES = {"sst2": 15_360, "pos": 6_144}
# A private update is shared by many examples; without privacy small batches are better.
BATCH, PLAIN_BATCH = {"sst2": 768, "pos": 512}, 32
RATES = {MINILM: (4e-3, 1e-3), MPNET: (2e-3, 1e-3)}  # of the deltas and of the head, with privacy
PLAIN_RATES = {MINILM: 1e-3, MPNET: 1e-3}
SEARCHED = ((4e-3, 1e-3), (1e-2, 1e-3), (1e-2, 4e-3), (2e-3, 2e-3))


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    model: str
    task: str
    epsilon: float | None
    seed: int
    learning_rate: float
    head_learning_rate: float | None
    search: bool = False


@dataclass
class Arguments:
    """What to run."""

    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"Among {', '.join(PARTS)}."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of local data. Default: the Hub."})
    mpnet: str = field(default=f"sentence-transformers/{MPNET}", metadata={"help": "Where MPNet is."})
    max_runs: int | None = field(default=None, metadata={"help": "Stop after so many."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Where the lines and the page go."})
    render_only: bool = field(default=False, metadata={"help": "Write the page of what is there."})


def planned(*parts: str) -> Iterator[Run]:
    """The runs of some parts, in their order."""
    if "search" in parts:
        for rate, head_rate in SEARCHED:
            yield Run(MINILM, "sst2", 8.0, 0, rate, head_rate, search=True)
    for name, model in (("minilm", MINILM), ("mpnet", MPNET)):
        for seed, task, epsilon in product(SEEDS, TASKS, EPSILONS) if name in parts else ():
            rates = RATES[model] if epsilon is not None else (PLAIN_RATES[model], None)
            yield Run(model, task, epsilon, seed, *rates)


def _run(entry: dict[str, Any]) -> Run:
    return Run(**{item.name: entry[item.name] for item in fields(Run)})


def arguments_of(run: Run, args: Arguments, folder: str) -> private.PrivateArguments:
    """The recipe's arguments for a run."""
    batch = PLAIN_BATCH if run.epsilon is None else BATCH[run.task]
    return private.PrivateArguments(
        model_name_or_path=args.mpnet if run.model == MPNET else f"sentence-transformers/{run.model}",
        task=run.task,
        target_epsilon=run.epsilon,
        data_dir=args.data_dir,
        output_dir=folder,
        learning_rate=run.learning_rate,
        head_learning_rate=run.head_learning_rate,
        batch_size=batch,
        accumulation=max(1, batch // 128),
        max_steps=EXAMPLES[run.task] // batch,
        precision="bf16",
        use_cpu=True,
        seed=run.seed,
    )


def line(run: Run, record: RunRecord) -> dict[str, Any]:
    """What is kept of a run."""
    kept = ("metric", "metrics", "seconds", "data", "versions", "commit", "dirty", "hardware", "notes", "finished")
    values = asdict(record)
    settings = {name: values["config"][name] for name in ("batch_size", "max_steps", "clip", "precision")}
    return asdict(run) | {"settings": settings} | {name: values[name] for name in kept}


def read(path: Path) -> list[dict[str, Any]]:
    """All lines that are there."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def study(args: Arguments) -> None:
    """Runs what is missing, and writes the page."""
    folder = Path(args.results_dir)
    path = folder / "private.jsonl"
    there = {_run(entry) for entry in read(path)}
    missing = [] if args.render_only else [run for run in planned(*args.parts) if run not in there]
    for run in missing[: args.max_runs]:
        with tempfile.TemporaryDirectory() as output:
            record = private.run(arguments_of(run, args, output))
        entry = json.dumps(line(run, record), allow_nan=False)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, "".join(f"{text}\n" for text in [*map(json.dumps, read(path)), entry]).encode())
        print(f"{run}: {record.metrics['final']}, {record.seconds:.0f} s", flush=True)
        write_bytes(folder / "private.md", page(read(path)).encode())
    write_bytes(folder / "private.md", page(read(path)).encode())


# --- the page ---

_INTRODUCTION = """# What privacy costs in accuracy

Made by `recipes/reproduction/private.py` from `private.jsonl` beside this page; do not edit. Accuracy on the
validation rows after the last update, mean over the seeds ± their standard deviation. ε is what was spent, with
δ = 1 / (10 n), for adding or removing one row (a sentence); *noise* is its standard deviation in multiples of the
clip. Without privacy the same number of examples is computed, in batches of 32. *Minutes* are wall time of one run on
one core of a busy machine: an upper bound, and nothing to compare systems by.
"""
_HEADINGS = ("model", "task", "rows", "ε", "seeds", "accuracy", "noise", "batch", "updates", "rate, head's", "minutes")


def page(lines: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    runs = [_run(entry) for entry in lines]
    groups: dict[Run, list[dict[str, Any]]] = {}
    for run in planned("minilm", "mpnet"):
        if run in runs:
            groups.setdefault(replace(run, seed=0), []).append(lines[runs.index(run)])
    searched = [lines[runs.index(run)] for run in planned("search") if run in runs]
    missing = [run for run in planned("minilm", "mpnet") if run not in runs]
    parts = [_INTRODUCTION, _table(_HEADINGS, [_cells(run, found) for run, found in groups.items()])]
    if missing:
        parts.append(f"Missing: {len(missing)} of {len(missing) + sum(map(len, groups.values()))} runs.\n")
    if searched:
        parts.append("The rates were chosen among these, on SST-2 with MiniLM, ε = 8, seed 0:\n")
        rates = [
            (f"{e['learning_rate']:g}", f"{e['head_learning_rate']:g}", f"{e['metrics']['final']['accuracy']:.3f}")
            for e in searched
        ]
        parts.append(_table(("rate", "head's", "accuracy"), rates))
    return "\n".join(parts)


def _cells(run: Run, found: list[dict[str, Any]]) -> tuple[str, ...]:
    scores = [entry["metrics"]["final"]["accuracy"] for entry in found]
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    spent = [entry["notes"].get("privacy", {}) for entry in found]
    settings = found[0]["settings"]
    head_rate = "the same" if run.head_learning_rate is None else f"{run.head_learning_rate:g}"
    return (
        run.model,
        TASKS[run.task],
        f"{found[0]['data']['rows']['train']:,}",
        "∞" if run.epsilon is None else f"{max(facts['epsilon'] for facts in spent):.2f}",
        str(len(scores)),
        f"{statistics.mean(scores):.3f}{spread}",
        "" if run.epsilon is None else f"{spent[0]['noise_multiplier']:.2f}",
        str(settings["batch_size"]),
        str(settings["max_steps"]),
        f"{run.learning_rate:g}, {head_rate}",
        f"{statistics.median(entry['seconds'] for entry in found) / 60:.0f}",
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv, description=(__doc__ or "").splitlines()[0])
    transformers.logging.set_verbosity_error()
    study(args)


if __name__ == "__main__":
    main()
