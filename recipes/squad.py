"""Fine-tunes on SQuAD v1.1, as in Figure 2 of the paper: exact match by training-set size, BitFit against Full-FT.

One run is one training-set size, one method, one learning rate and one seed. Contexts are seen through overlapping
windows, and answers are read off all windows of a question (`study/spans.py`); EM and F1 are the official script's
(`study/answers.py`), in percent. `predictions.json` has the final epoch's answers in the official format, the best of
each question by its id, and `nbest_predictions.json` the runners-up with their scores.

    accelerate launch recipes/squad.py --config recipes/configs/squad_paper_bert_base.yaml --train_size 4000
    accelerate launch recipes/squad.py --config recipes/configs/squad_minilm_cpu.yaml --data_dir path/to/data
    accelerate launch recipes/squad.py --method full --learning_rate 3e-5 --epochs 2
    accelerate launch --config_file recipes/accelerate/cpu_2_processes.yaml \\
        recipes/squad.py --use_cpu --config recipes/configs/squad_minilm_cpu.yaml --data_dir path/to/data

`--train_size` draws questions by `--seed`, and smaller draws are part of larger ones. A small subset would be trained
for few steps only, and its figure would speak of that: `--min_steps` is the least number of steps for every size
(evaluated as many epochs apart as `--eval_every` says).
Data is `rajpurkar/squad` from the Hub, or local files `<data_dir>/squad/{train,validation}.jsonl.gz` in the same
columns. `--extra_train_file` adds the questions of another such file, without the articles that the validation split
is about. The best epoch is chosen on the rows that the figures are about, as in the paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common.answers import squad_scores
from common.arguments import StudyArguments
from common.data import load_splits, subset
from common.models import locate, new_model
from common.record import RunRecord
from common.spans import check_windows, find_answers, make_windows
from common.training import Split, TaskData, chosen_method, run_recipe, train
from datasets import Dataset, concatenate_datasets
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
)

SQUAD_NAME = "rajpurkar/squad"
COLUMNS = ["id", "title", "context", "question", "answers"]


@dataclass
class SquadArguments(StudyArguments):
    max_length: int = field(default=384, metadata={"help": "Of a window, in tokens."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows share."})
    max_question_length: int = field(default=64, metadata={"help": "In tokens; longer questions are cut."})
    max_answer_length: int = field(default=30, metadata={"help": "Of a predicted answer, in tokens."})
    n_best: int = field(default=20, metadata={"help": "Answers per question in nbest_predictions.json."})
    min_steps: int = field(default=0, metadata={"help": "Train for at least so many steps, whatever `epochs` says."})
    extra_train_file: str | None = field(
        default=None, metadata={"help": "JSON lines with more training questions, beside those of the train split."}
    )
    output_dir: str = field(
        default="outputs/squad", metadata={"help": "Gets run.json, predictions and what is saved."}
    )


def load_questions(args: SquadArguments) -> tuple[Dataset, Dataset]:
    """All questions to train on and to evaluate on."""
    splits = load_splits(SQUAD_NAME, data_dir=args.data_dir, folders=("squad", ""))
    train_rows, evaluation = (splits[name].select_columns(COLUMNS) for name in ("train", "validation"))
    if args.extra_train_file is not None:
        if not Path(args.extra_train_file).is_file():
            raise SystemExit(f"--extra_train_file {args.extra_train_file}: there is no such file.")
        extra = Dataset.from_json(args.extra_train_file).select_columns(COLUMNS).cast(train_rows.features)
        held_out = set(evaluation["title"])
        extra = extra.filter(lambda title: title not in held_out, input_columns="title", keep_in_memory=True)
        train_rows = concatenate_datasets([train_rows, extra])
    return train_rows, evaluation


def windows_of(questions: Dataset, tokenizer: PreTrainedTokenizerBase, args: SquadArguments) -> Dataset:
    """The windows of questions, as [`make_windows`] describes them."""
    cut = partial(
        make_windows,
        tokenizer=tokenizer,
        max_length=args.max_length,
        doc_stride=args.doc_stride,
        max_question_length=args.max_question_length,
    )
    return questions.map(
        cut, batched=True, with_indices=True, remove_columns=questions.column_names, keep_in_memory=True
    )


class Answers:
    """
    Scores a model's answers, as a `compute_metrics` for a Trainer, and keeps the last ones.

    Args:
        questions (`datasets.Dataset`): What is asked.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        args ([`SquadArguments`]): How windows are cut and answers are searched.

    Attributes:
        windows (`datasets.Dataset`): What the model is evaluated on: the windows of all questions, long ones first, so
            that a batch holds windows of like length.
        found (`dict[str, list[dict]]`): Per question id the answers of the last evaluation, best first.
    """

    def __init__(self, questions: Dataset, tokenizer: PreTrainedTokenizerBase, args: SquadArguments) -> None:
        self.questions = questions
        windows = windows_of(questions, tokenizer, args)
        by_length = np.argsort([-len(ids) for ids in windows["input_ids"]], kind="stable")
        self.windows = windows.select(by_length)
        self.golds = {row["id"]: row["answers"]["text"] for row in questions}
        if len(self.golds) != len(questions):
            raise SystemExit(
                f"{len(questions)} questions to evaluate on have {len(self.golds)} ids between them: predictions "
                "could not be told apart. Give every question an id of its own."
            )
        self.search = partial(find_answers, n_best=args.n_best, max_answer_length=args.max_answer_length)
        self.found: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        for name, labels in zip(("start_positions", "end_positions"), prediction.label_ids):
            if not np.array_equal(labels, self.windows[name]):
                raise RuntimeError(
                    f"The logits do not come in the order of the windows ({name} differ): answers would be cut out of "
                    "the wrong contexts. Evaluate with a sampler that keeps the order of the rows."
                )
        start_logits, end_logits = prediction.predictions[:2]
        self.found = self.search(self.questions, self.windows, start_logits, end_logits)
        return squad_scores(self.best(), self.golds)

    def best(self) -> dict[str, str]:
        """The best answer to each question, by its id: the official format of predictions."""
        return {name: answers[0]["text"] for name, answers in self.found.items()}

    def write(self, folder: Path) -> list[str]:
        """Writes the last answers into a folder, and returns the names of the files."""
        files = {"predictions.json": self.best(), "nbest_predictions.json": self.found}
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        return list(files)


def with_min_steps(args: SquadArguments, windows: int) -> SquadArguments:
    """
    The arguments of a run that is trained for at least `min_steps` steps.

    More steps mean more epochs, and an evaluation after each of them unless `eval_every` says otherwise.

    Args:
        args ([`SquadArguments`]): As asked for.
        windows (`int`): Of the training questions: what batches are made of.
    """
    per_epoch = math.ceil(windows / args.batch_size)
    steps = args.max_steps or math.ceil(args.epochs * per_epoch)
    return args if steps >= args.min_steps else replace(args, max_steps=args.min_steps)


def run(args: SquadArguments) -> RunRecord:
    """One run; see [`common.training.train`] for the files that it leaves."""
    if args.dev_halves:
        raise SystemExit(
            "--dev_halves is for GLUE and for tagging; the questions of SQuAD are evaluated on as a whole."
        )
    method = chosen_method(args)
    tokenizer = AutoTokenizer.from_pretrained(locate(args.model_name_or_path))
    tokenizer.padding_side = "right"  # where the logits of a window begin
    try:
        check_windows(tokenizer, args.max_length, args.doc_stride, args.max_question_length)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    train_questions, eval_questions = load_questions(args)
    train_questions = subset(train_questions, args.train_size, args.seed)
    train_windows = windows_of(train_questions, tokenizer, args)
    answers = Answers(subset(eval_questions, args.eval_size), tokenizer, args)
    train_sample = None
    if args.train_metrics:
        on_train = Answers(subset(train_questions, args.train_metrics), tokenizer, args)
        train_sample = Split(on_train.windows, on_train)
    args = with_min_steps(args, len(train_windows))
    data = TaskData(
        name="squad",
        train=train_windows.remove_columns(["question_index", "context_start", "offsets"]),
        evaluation={"validation": Split(answers.windows, answers)},
        metric="exact_match",
        collator=DataCollatorWithPadding(tokenizer),
        tokenizer=tokenizer,
        source="local files" if args.data_dir else SQUAD_NAME,
        train_sample=train_sample,
        notes={"questions": {"train": len(train_questions), "validation": len(answers.questions)}},
    )

    def write_answers(trainer: Trainer) -> dict[str, Any]:
        files: Sequence[str] = ()
        if trainer.is_world_process_zero():
            files = answers.write(Path(args.output_dir))
        return {"predictions": files, "steps": trainer.state.global_step}

    model = new_model(AutoModelForQuestionAnswering, args.model_name_or_path, args.seed)
    return train(method, model, data, args, recipe="squad", after=write_answers)


def main(argv: list[str] | None = None) -> RunRecord:
    return run_recipe(run, SquadArguments, argv, __doc__)


if __name__ == "__main__":
    main()
