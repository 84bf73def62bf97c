"""Reproduces the tables and figures of the BitFit paper: does the runs that are missing, and renders what is there.

    python recipes/reproduction/reproduce.py --table 3 --config minilm_cpu --data_dir path/to/data --dry_run
    python recipes/reproduction/reproduce.py --table 3 --config minilm_cpu --data_dir path/to/data
    python recipes/reproduction/reproduce.py --table 3 --config minilm_cpu --tasks rte_1k --time_limit 60
    python recipes/reproduction/reproduce.py --table 1 2 3 --figure 1 2 --study generalization_gap pos --render_only
    python recipes/reproduction/reproduce.py --study defaults --config mpnet_cpu --data_dir path/to/data
    accelerate launch recipes/reproduction/reproduce.py --table 2 --config paper
    python recipes/reproduction/reproduce.py --table 2 --config paper --shard 0/8

A study config, in `recipes/reproduction/configs/`, says which runs a table consists of: `paper` is the paper's own
setting (BERT-base, BERT-large and RoBERTa-base, data of the Hub, days of GPU time), `minilm_cpu` a small real model on
two CPU cores and `mpnet_cpu` one of the paper's size. `--study defaults` asks whether one setting serves everything:
BitFit as it comes out of the box against the best of a grid.

Every finished run is one JSON file in `<results_dir>/<config>/runs`, named by what it depends on: what two tables
need is done once, a sweep that was killed goes on where it stopped, and a table is rendered from what is there, with
what is missing and the command that goes on. Tables, figures and `claims.md` are written beside the runs.

Several processes may work on one folder: each run is claimed by the first that gets to it. Under `accelerate launch`
all processes train one run together; machines without a shared folder split the work with `--shard`.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # the recipes are found beside this folder, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import transformers
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from bitfit_hf.storage.files import write_bytes
from reproduction import claims, defaults, figures
from reproduction.cost import Bill, CostModel, bill
from reproduction.markdown import Context
from reproduction.plan import Cell, Selection, expand
from reproduction.render import TITLES, render_table
from reproduction.runner import ORDERS, Places, RecipeRunner, Sweep, process_index, run_missing
from reproduction.store import DamagedRunError, RunStore
from reproduction.studies import StudyConfig, StudyError, read_config

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"


@dataclass
class ReproduceArguments:
    table: list[int] = field(default_factory=list, metadata={"help": "Tables of the paper: 1, 2, 3."})
    figure: list[int] = field(default_factory=list, metadata={"help": "Figures of the paper: 1, 2."})
    study: list[str] = field(default_factory=list, metadata={"help": "defaults, one_epoch, generalization_gap, pos."})
    config: str = field(
        default="minilm_cpu",
        metadata={"help": "A study config: a name in recipes/reproduction/configs, or a file."},
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of local data. Default: the Hub."})
    model_path: list[str] = field(
        default_factory=list, metadata={"help": "NAME=FOLDER: read the config's model NAME from a local folder."}
    )
    results_dir: str = field(default=str(HERE / "results"), metadata={"help": "Gets a folder for each study config."})
    dry_run: bool = field(default=False, metadata={"help": "Show the plan and its cost, and do nothing."})
    render_only: bool = field(default=False, metadata={"help": "Render what is there without doing what is missing."})
    models: list[str] = field(default_factory=list, metadata={"help": "Do only runs of these models."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Do only runs of these tasks."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Do only runs of these methods."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Do only runs with these seeds."})
    learning_rates: list[float] = field(default_factory=list, metadata={"help": "Do only runs at these rates."})
    order: str = field(
        default="useful",
        metadata={"help": "useful (every cell once, then the grids, then further seeds) or cheapest."},
    )
    time_limit: float | None = field(
        default=None, metadata={"help": "Minutes; no run is started that would not end in time."}
    )
    shard: str = field(default="0/1", metadata={"help": "i/n: only every n-th cell of the plan, from i = 0."})
    keep_going: bool = field(default=False, metadata={"help": "Go on after a run that failed (one process only)."})
    keep_outputs: str | None = field(
        default=None, metadata={"help": "Folder for what each run writes: deltas, prediction files. Default: deleted."}
    )
    repeat_damaged: bool = field(default=False, metadata={"help": "Set damaged run files aside and run again."})


def asked_studies(args: ReproduceArguments) -> list[str]:
    """The studies by their names in a study config."""
    asked = [f"table{number}" for number in args.table] + [f"figure{number}" for number in args.figure] + args.study
    if not asked:
        raise SystemExit(
            "Say what to reproduce: --table 1|2|3, --figure 1|2, --study defaults|one_epoch|generalization_gap|pos."
        )
    return list(dict.fromkeys(asked))


def config_path(name: str) -> Path:
    """The file of a study config that is named as a file or by its stem."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if name not in known:
        raise SystemExit(f"--config {name}: there is {', '.join(known)}; or give a YAML file, such as {name}.yaml.")
    return CONFIGS / f"{name}.yaml"


def selection_of(args: ReproduceArguments) -> Selection:
    """What the options leave of the plan."""
    index, slash, count = args.shard.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise SystemExit(f"--shard {args.shard}: expected i/n with 0 <= i < n, such as 0/4.")
    return Selection(
        models=args.models or None,
        tasks=args.tasks or None,
        methods=args.methods or None,
        seeds=args.seeds or None,
        learning_rates=args.learning_rates or None,
        shard=(int(index), int(count)),
    )


def places_of(args: ReproduceArguments) -> Places:
    """Where this machine has models and data."""
    pairs = [entry.partition("=") for entry in args.model_path]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise SystemExit(f"--model_path {' '.join(wrong)}: expected NAME=FOLDER.")
    return Places(args.data_dir, {name: folder for name, _, folder in pairs})


def show_plan(found: Bill, whole: list[Cell], console: Console) -> None:
    """The plan and its cost."""
    table = Table(title=f"{found.done} of {found.wanted} runs are there; {found.missing} are missing")
    for heading in ("model", "task", "method", "rates", "seeds", "missing now"):
        name = heading in ("model", "task", "method")
        table.add_column(heading, justify="left" if name else "right", no_wrap=name, overflow="fold")
    counts: dict[tuple[str, str, str], int] = {}
    for run in found.runs:
        key = (run.model.name, run.task.name, run.method.name)
        counts[key] = counts.get(key, 0) + 1
    for cell in whole:
        key = (cell.model.name, cell.task.name, cell.method.name)
        rates = " ".join(f"{rate:g}" for rate in cell.learning_rates)
        table.add_row(*key, rates, " ".join(map(str, cell.seeds)), str(counts.get(key, 0)))
    console.print(table)
    hours = f"about {found.hours:.1f} hours"
    if found.unknown:
        some = f"{found.unknown} runs of unknown length (the study config assumes no speed, and no run is there yet)"
        hours = some if found.unknown == found.missing else f"{hours} and {some}"
    if found.assumed:
        hours += f" ({found.assumed} runs at the speed that the study config assumes)"
    console.print(
        f"Missing: {len(found.runs)} runs that can be done now and {found.waiting} that wait for their learning rate; "
        f"{found.tokens / 1e6:,.1f} million trained tokens; {hours}, one run after the other."
    )


def render(studies: list[str], config: StudyConfig, context: Context, folder: Path) -> list[Path]:
    """Writes the Markdown and the pictures of some studies, and `claims.md` of all of the config's."""
    written = []
    for study in studies:
        cells = expand(config, [study])
        if study == defaults.STUDY:
            documents = defaults.render_defaults(cells, context)
        elif study == defaults.ONE_EPOCH:
            documents = {f"{study}.md": defaults.render_one_epoch(cells, context).encode()}
        elif study in TITLES:
            documents = {f"{study}.md": render_table(study, cells, context).encode()}
        else:
            documents = figures.render_figure(study, cells, context)
        for name, content in documents.items():
            write_bytes(folder / name, content)
            written.append(folder / name)
    write_bytes(folder / "claims.md", claims.render_claims(expand(config, config.studies), context).encode())
    return [*written, folder / "claims.md"]


def main(argv: list[str] | None = None) -> Sweep:
    """Plans, does what is missing and renders; see the module's docstring."""
    (args,) = HfArgumentParser(ReproduceArguments, allow_abbrev=False).parse_args_into_dataclasses(
        argv, look_for_args_file=False
    )
    logging.basicConfig(level=logging.WARNING)
    transformers.logging.set_verbosity_error()
    if args.order not in ORDERS:
        raise SystemExit(f"--order {args.order}: one of {', '.join(ORDERS)}.")
    console = Console(quiet=process_index() != 0)
    studies, selection, places = asked_studies(args), selection_of(args), places_of(args)
    try:
        config = read_config(config_path(args.config))
        cells = expand(config, studies)
        selection.check(cells)
    except (StudyError, ValueError) as error:
        raise SystemExit(str(error)) from None
    folder = Path(args.results_dir) / config.name
    store = RunStore(folder)
    everything = [run for cell in expand(config, config.studies) for run in cell.possible()]
    if args.repeat_damaged and process_index() == 0:
        for path in store.set_aside_damaged(everything):
            console.print(f"Set aside: {path}", soft_wrap=True)
    if damaged := store.damaged(everything):
        raise SystemExit("\n".join(str(error) for error in damaged))

    costs = CostModel(config, store, expand(config, config.studies))
    show_plan(bill(cells, store, costs, config.score, selection), [c for c in cells if selection.cell(c)], console)
    if args.dry_run:
        return Sweep()
    sweep = Sweep()
    if not args.render_only:
        sweep = run_missing(
            cells,
            store,
            RecipeRunner(places, args.keep_outputs),
            costs,
            which=config.score,
            selection=selection,
            order=args.order,
            time_limit=None if args.time_limit is None else 60 * args.time_limit,
            keep_going=args.keep_going,
            tell=lambda line: console.print(line, soft_wrap=True),
        )
        for text in (
            f"{len(sweep.done)} runs done",
            sweep.stopped and f"Stopped by {sweep.stopped}",
            sweep.elsewhere and f"{sweep.elsewhere} runs are under way in other processes",
        ):
            if text:
                console.print(f"{text}.")
    if process_index() == 0:
        try:
            written = render(studies, config, Context(config, store, args.config, bool(args.data_dir)), folder)
        except DamagedRunError as error:  # damaged since the sweep began
            raise SystemExit(str(error)) from None
        for path in written:
            console.print(f"Written: {path}", soft_wrap=True)
    if sweep.failed:
        lines = [f"{run}: {error}" for run, error in sweep.failed.items()]
        raise SystemExit("Runs that failed:\n" + "\n".join(lines))
    return sweep


if __name__ == "__main__":
    main()
