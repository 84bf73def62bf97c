"""Fine-tunes on a task of GLUE, as in Tables 1 to 3 of the paper, with BitFit or any system that it is compared with.

One run is one task, one method, one learning rate and one seed. It is evaluated after every epoch; `run.json` has the
whole history, the final figures and those of the best epoch, which the paper reports. What the method needs beside the
base is saved, and where there is a test split, the prediction file of the GLUE server is written. WNLI is left out, as
in the paper.

    accelerate launch recipes/glue.py --config recipes/configs/glue_paper_bert_base.yaml --task rte
    accelerate launch recipes/glue.py --config recipes/configs/glue_minilm_cpu.yaml --task rte --data_dir path/to/data
    accelerate launch recipes/glue.py --task mrpc --method bitfit:query+intermediate --learning_rate 7e-4
    accelerate launch recipes/glue.py --task mnli --method full --learning_rate 2e-5 --train_metrics 2000
    accelerate launch --config_file recipes/accelerate/cpu_2_processes.yaml \\
        recipes/glue.py --use_cpu --config recipes/configs/glue_minilm_cpu.yaml --task sst2 --data_dir path/to/data

Data is `nyu-mll/glue` from the Hub, or local files `<data_dir>/glue/<task>/<split>.jsonl.gz` in the same columns. The
best epoch is chosen on the rows that the figures are about, as in the paper: such a figure is a little flattered, more
so after a search over learning rates. With `--dev_halves` it is chosen on one half of them, and metrics that begin
with `report_` are of the other. What is saved, and predicted with, is the model of the final epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.arguments import StudyArguments
from common.data import GLUE, GLUE_NAME, by_length, evaluation_parts, load_glue, load_splits, subset
from common.metrics import answers, glue_metrics
from common.models import locate, new_model
from common.record import RunRecord
from common.training import Split, TaskData, chosen_method, run_recipe, train
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
)


@dataclass
class GlueArguments(StudyArguments):
    task: str = field(default="rte", metadata={"help": f"One of {', '.join(GLUE)}."})
    predict_validation: bool = field(
        default=False, metadata={"help": "Write prediction files for the validation split too."}
    )
    diagnostics: bool = field(default=False, metadata={"help": "With mnli: AX.tsv, for GLUE's diagnostic set."})
    output_dir: str = field(default="outputs/glue", metadata={"help": "Gets run.json, predictions and what is saved."})


def tokenized(rows: Dataset, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows as the model takes them, with `labels` where there are labels."""

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)

    made = rows.select_columns(list(columns)).map(
        tokenize, batched=True, remove_columns=list(columns), keep_in_memory=True
    )
    return made.add_column("labels", list(rows["label"])) if "label" in rows.column_names else made


def write_predictions(path: Path, task: str, rows: Dataset, predictions: Any) -> None:
    """
    Writes a file for the GLUE server: `index` and `prediction`, in the order of the index.

    Args:
        path (`Path`): Where to.
        task (`str`): Decides the form: a label's name (RTE, QNLI, MNLI), its id, or a similarity from 0 to 5 (STS-B).
        rows (`Dataset`): What was predicted; `idx` is the index where the rows have it.
        predictions (array): Label ids or values, one per row.
    """
    spec = GLUE[task]
    index = list(rows["idx"]) if "idx" in rows.column_names else list(range(len(rows)))

    def shown(value: Any) -> str:
        if not spec.labels:
            return f"{min(max(float(value), 0.0), 5.0):.3f}"
        return spec.labels[int(value)] if spec.names_in_files else str(int(value))

    lines = [f"{number}\t{shown(value)}\n" for number, value in sorted(zip(index, predictions, strict=True))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("index\tprediction\n" + "".join(lines), encoding="utf-8")


def run(args: GlueArguments) -> RunRecord:
    """One run; see [`common.training.train`] for the files that it leaves."""
    if args.task not in GLUE:
        raise SystemExit(f"--task {args.task}: choose from {', '.join(GLUE)} (WNLI is left out, as in the paper).")
    if args.diagnostics and args.task != "mnli":
        raise SystemExit(f"--diagnostics goes with --task mnli, whose labels the diagnostic set has, not {args.task}.")
    method = chosen_method(args)
    spec = GLUE[args.task]
    splits = load_glue(args.task, args.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(locate(args.model_name_or_path))

    def prepare(rows: Dataset) -> Dataset:
        return tokenized(rows, spec.columns, tokenizer, args.max_length)

    metrics = glue_metrics(args.task)
    training_rows = prepare(subset(splits["train"], args.train_size, args.seed))
    dev = {
        name.removeprefix("validation_"): subset(splits[name], args.eval_size) for name in spec.splits("validation")
    }
    data = TaskData(
        name=args.task,
        train=training_rows,
        evaluation={
            name: Split(by_length(prepare(rows)), metrics)
            for name, rows in evaluation_parts(dev, args.dev_halves).items()
        },
        metric=spec.metric,
        collator=DataCollatorWithPadding(tokenizer),
        tokenizer=tokenizer,
        source="local files" if args.data_dir else GLUE_NAME,
        train_sample=Split(by_length(subset(training_rows, args.train_metrics)), metrics)
        if args.train_metrics
        else None,
    )

    def predict(trainer: Trainer) -> dict[str, Any]:
        asked: list[tuple[str, str, Dataset]] = []
        for kind in ("test", "validation") if args.predict_validation else ("test",):
            folder = "predictions" if kind == "test" else "predictions_validation"
            asked += [
                (folder, file, splits[f"{kind}{suffix}"])
                for suffix, file in spec.files.items()
                if f"{kind}{suffix}" in splits
            ]
        if args.diagnostics:
            ax = load_splits(GLUE_NAME, "ax", data_dir=args.data_dir, folders=("glue/ax", "ax"), needed="test")
            asked.append(("predictions", "AX.tsv", ax["test"]))
        for folder, file, rows in asked:
            texts = rows.select_columns([name for name in rows.column_names if name != "label"])
            logits = trainer.predict(prepare(texts)).predictions
            if trainer.is_world_process_zero():
                write_predictions(Path(args.output_dir) / folder / file, args.task, rows, answers(logits))
        return {"predictions": [f"{folder}/{file}" for folder, file, _ in asked]}

    names = {"id2label": dict(enumerate(spec.labels))} if spec.labels else {"num_labels": 1}
    model = new_model(AutoModelForSequenceClassification, args.model_name_or_path, args.seed, **names)
    return train(method, model, data, args, recipe="glue", after=predict)


def main(argv: list[str] | None = None) -> RunRecord:
    return run_recipe(run, GlueArguments, argv, __doc__)


if __name__ == "__main__":
    main()
