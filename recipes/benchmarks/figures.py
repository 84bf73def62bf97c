"""The figures that README and documentation quote, from the recorded results and from nowhere else.

    python recipes/benchmarks/figures.py            # writes them into README.md
    python recipes/benchmarks/figures.py --check    # says whether README.md has them

README.md has them between a pair of marks, `<!-- figures: costs -->` and `<!-- /figures -->`; the pages under `docs/`
name them, `{{ step_bitfit_bert_base }}`, and get them when they are built. Run this after new results: `make bench`,
`recipes/benchmarks/serving.py`, `make quickstart ARGS="--record recipes/benchmarks/results/quickstart.json"`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes" / "benchmarks" / "results"
PLACE = RESULTS.relative_to(ROOT).as_posix()
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- /figures -->)", flags=re.DOTALL)

# How a system of the training benchmark is called in README, and its name in the benchmark of serving.
SYSTEMS = {
    "full fine-tuning": ("full fine-tuning", "merged"),
    "LoRA r=8, q and v": ("LoRA, rank 8", "lora"),
    "BEFT, all Linears": ("BEFT (PEFT's)", None),
    "BitFit": ("**bitfit_hf**", "bank"),
}
KEYS = {"full fine-tuning": "full", "LoRA r=8, q and v": "lora", "BitFit": "bitfit"}
RECOMPUTING = "BitFit, "  # with its activations computed again


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def training(shape: str) -> dict[str, dict[str, Any]]:
    """The rows of a shape of the training benchmark by system."""
    return {row["system"]: row for row in read(f"training-{shape}-cpu.json")["rows"]}


def serving(system: str, batch: int, length: int, tasks: int = 1000) -> dict[str, Any]:
    """A row of the benchmark of serving."""
    wanted = {"system": system, "batch_size": batch, "sequence_length": length, "tasks": tasks}
    (row,) = (row for row in read("serve.json")["throughput"] if wanted.items() <= row.items())
    return row


def size(count: float) -> str:
    """Bytes in powers of ten."""
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def quoted() -> dict[str, str]:
    """Every figure by its name."""
    found = {}
    for shape in ("bert-base", "bert-large", "bert-base-no-dropout"):
        for system, row in training(shape).items():
            key = "recompute" if system.startswith(RECOMPUTING) else KEYS.get(system)
            if key is not None:
                name = f"{key}_{shape.replace('-', '_')}"
                found[f"step_{name}"] = f"{row['ratio']:.2f}"
                found[f"spread_{name}"] = f"{row['spread']:.2f}"
                found[f"kept_{name}"] = f"{row['kept_bytes'] / 2**20:,.0f} MiB"
    for batch, length in ((32, 16), (32, 64), (128, 16)):
        row = serving("bank", batch, length)
        found[f"serve_{batch}x{length}"] = f"{row['throughput_of_base']['median']:.2f}"
        for system in ("merged", "lora"):
            other = serving(system, batch, length)["bank_is_faster_by"]["median"]
            found[f"serve_{batch}x{length}_over_{system}"] = f"{other:.1f}"
    for entry in read("serve.json")["memory"]:
        model = "bert_base" if entry["model"].startswith("BERT") else "minilm"
        found[f"thousand_tasks_{model}_{entry['dtype']}"] = size(entry["tasks"])
    found["quickstart_table"] = quickstart_table()
    return found


def costs() -> str:
    """What a task costs, against peers."""
    rows = training("bert-base")
    lines = [
        "| | trained | a task on disk | a step¹ | memory¹ | 1,000 tasks² |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for system, (name, served) in SYSTEMS.items():
        row = rows[system]
        if served == "bank":
            stream = "**1**"
        elif served is None:
            stream = "cannot mix"
        else:
            stream = f"{1 / serving(served, 32, 64)['bank_is_faster_by']['median']:.2f}"
        lines.append(
            f"| {name} | {row['trainable']:,} | {size(row['disk_bytes'])} "
            f"| {row['ratio']:.2f}&nbsp;±&nbsp;{row['spread']:.2f} | {row['kept_bytes'] / 2**20:,.0f} MiB | {stream} |"
        )
    lines += [
        "",
        "<sub>¹ BERT-base, batch 8 × 128, two CPU cores; time over that of biases unfrozen by hand, memory kept for "
        f"backward: [`training.md`]({PLACE}/training.md). ² Throughput on MiniLM, batch 32 × 64, a random task per "
        "text; full fine-tuning is merged models in turn: "
        f"[`serve.json`]({PLACE}/serve.json). Both in `{PLACE}/`.</sub>",
    ]
    return "\n".join(lines)


def quickstart() -> str:
    """What `make quickstart` has brought, in a sentence."""
    reached = "; ".join(
        f"{row['task']} ({row['labels']} labels) **{row['bitfit']:.2f}** "
        f"({row['frozen']:.2f}, {row['bag_of_words']:.2f})"
        for row in read("quickstart.json")["results"]
    )
    return (
        f"Accuracy of one run (in brackets: the head alone on a frozen body; a bag of words): {reached}: "
        f"[`{PLACE}/quickstart.json`]({PLACE}/quickstart.json)."
    )


def quickstart_table() -> str:
    """The same for the documentation, whole."""
    record = read("quickstart.json")
    lines = [
        "| accuracy, one run | majority | bag of words | frozen body | BitFit | trained | on disk |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["results"]:
        values = " | ".join(f"{row[name]:.2f}" for name in ("majority", "bag_of_words", "frozen"))
        trained = row["biases"] + row["head"]
        lines.append(
            f"| {row['task']} ({row['labels']} labels) | {values} | **{row['bitfit']:.2f}** | "
            f"{trained:,} ({trained / row['base']:.2%}) | {size(row['bytes'])} |"
        )
    return "\n".join(lines)


BLOCKS = {"costs": costs, "quickstart": quickstart}


def filled(text: str) -> str:
    """A page with the figures of today between its marks."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if figures differ")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    wanted = filled(text)
    if wanted == text:
        print("README.md has the figures of the recorded results.")
    elif args.check:
        print(
            "README.md has other figures than the recorded results: run recipes/benchmarks/figures.py.",
            file=sys.stderr,
        )
        return 1
    else:
        path.write_text(wanted, encoding="utf-8")
        print("README.md has been given the figures of the recorded results.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
