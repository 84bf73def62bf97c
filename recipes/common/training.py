"""One training run of one method on one task, with a stock Trainer, and its record."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from reproduction.baselines import Method, make_method
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .arguments import StudyArguments, parse
from .engine import DDP, SINGLE, check_engine
from .hardware import computes_in_bf16
from .metrics import Metrics, constant
from .models import public_name
from .record import RunRecord, checkout, hardware, without_paths


@dataclass
class Split:
    """Rows that a model is evaluated on, and how."""

    rows: Dataset
    metrics: Metrics | None = None


@dataclass
class TaskData:
    """
    A task as a Trainer takes it.

    Args:
        name (`str`): Of the task.
        train (`Dataset`): Tokenized training rows.
        evaluation (`dict[str, Split]`): Tokenized evaluation rows by name. The first chooses the best epoch; metrics
            of the others carry their name in front.
        metric (`str`): Which metric of the first chooses.
        collator (`Callable`): Makes a batch of rows.
        tokenizer (`PreTrainedTokenizerBase`): Saved with what was trained.
        source (`str`): Where the rows are from.
        train_sample (`Split`, *optional*): Training rows to evaluate on too.
        greater_is_better (`bool`, *optional*, defaults to `True`): Whether a larger `metric` is better.
        shrink (`Callable`, *optional*): `preprocess_logits_for_metrics` of the Trainer.
        notes (`dict[str, Any]`, *optional*): For the record.
    """

    name: str
    train: Dataset
    evaluation: dict[str, Split]
    metric: str
    collator: Callable[[list[Any]], dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    source: str
    train_sample: Split | None = None
    greater_is_better: bool = True
    shrink: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Times(NamedTuple):
    """Seconds on the clock on the wall, and of this process's processors together; the second is not disturbed by what
    else a machine does, and says nothing of work on a GPU."""

    wall: float
    processor: float


class Stopwatch:
    """Adds up the time between `go` and `stop`."""

    def __init__(self) -> None:
        self._total = Times(0.0, 0.0)
        self._began: Times | None = None

    def go(self) -> None:
        """Starts anew, whether or not it runs already."""
        self._began = self._now()

    def stop(self) -> None:
        """Ends what [`go`] began; nothing, if it does not run."""
        self._total, self._began = self.read(), None

    def read(self) -> Times:
        """The time until now."""
        if self._began is None:
            return self._total
        now = self._now()
        return Times(*(total + end - start for total, start, end in zip(self._total, self._began, now)))

    @staticmethod
    def _now() -> Times:
        return Times(time.perf_counter(), time.process_time())


class Evaluation(TrainerCallback):
    """
    Evaluates at the ends of epochs, and keeps the history.

    A Trainer has one `compute_metrics` for all its data; here each split has its own, and splits of training rows are
    told apart from evaluation rows. The last epoch is left to [`train`], after the method has finished its work.

    Args:
        data ([`TaskData`]): What to evaluate on.
        every (`int`): Epochs from one evaluation to the next.
    """

    def __init__(self, data: TaskData, every: int = 1) -> None:
        self.data = data
        self.every = every
        self.history: list[dict[str, Any]] = []
        self.trainer: Trainer | None = None
        self._epochs = 0
        self._clock = Stopwatch()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # With "group_by_length" a Trainer shuffles what it evaluates and predicts too: metrics that go by the row, and
        # files of predictions, would be about other rows. The training sampler has been made by now.
        args.train_sampling_strategy = "sequential"
        self._clock.go()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The order of the rows comes from the global random state. Processes that have drawn differently many numbers
        # would each take their share of another order, and rows would be missed. It is also the same for every method.
        torch.manual_seed(1000 * args.seed + 1 + self._epochs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epochs += 1
        if self._epochs % self.every == 0 and not control.should_training_stop and state.global_step < state.max_steps:
            self.evaluate(state)
            control.should_log = True  # the epoch's loss, still to come: logging the evaluation has withdrawn it

    def evaluate(self, state: TrainerState) -> None:
        """Adds an entry to the history."""
        self._clock.stop()
        spent = self._clock.read()
        entry: dict[str, Any] = {
            "epoch": state.epoch,
            "step": state.global_step,
            "seconds": spent.wall,
            "processor_seconds": spent.processor,
            "train_loss": None,
            "eval": {},
            "constant": None,
        }
        for index, (name, split) in enumerate(self.data.evaluation.items()):
            found, same = self._metrics(split, f"eval_{name}" if index else "eval")
            entry["eval"] |= {f"{name}_{key}" if index else key: value for key, value in found.items()}
            entry["constant"] = entry["constant"] if index else same
        if self.data.train_sample is not None:
            entry["train"] = self._metrics(self.data.train_sample, "train_sample")[0]
        self.history.append(entry)
        self._clock.go()

    def _metrics(self, split: Split, prefix: str) -> tuple[dict[str, float], bool | None]:
        """The metrics of a split, and whether all its answers are the same."""
        assert self.trainer is not None
        same: list[bool | None] = [None]

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            same[0] = constant(prediction)
            return split.metrics(prediction) if split.metrics is not None else {}

        self.trainer.compute_metrics = compute if split.metrics is not None else None
        found = self.trainer.evaluate(split.rows, metric_key_prefix=prefix)
        speeds = ("_runtime", "_per_second", "_model_preparation_time")
        metrics = {
            name.removeprefix(f"{prefix}_"): float(value)
            for name, value in found.items()
            if name.startswith(f"{prefix}_") and not name.endswith(speeds)
        }
        return metrics, same[0]

    def best(self) -> dict[str, Any]:
        """The entry with the best metric; the first of equals."""
        sign = 1 if self.data.greater_is_better else -1

        def score(entry: dict[str, Any]) -> float:
            value = entry["eval"][self.data.metric]
            return sign * value if math.isfinite(value) else -math.inf

        return max(self.history, key=score)


def training_arguments(args: StudyArguments, *, accumulation: int = 1, **changes: Any) -> TrainingArguments:
    """
    The Trainer's arguments. The batch is split over the processes, so that a run is the same on one and on several.

    Args:
        args ([`StudyArguments`]): Of the recipe.
        accumulation (`int`, *optional*, defaults to 1): Parts of a process's batch that are computed one by one.
        changes: Of the Trainer's arguments.

    Raises:
        `SystemExit`: The batch cannot be split evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % (processes * accumulation):
        parts = f"{processes} processes" + (f" and {accumulation} parts" if accumulation > 1 else "")
        raise SystemExit(f"--batch_size {args.batch_size} cannot be split over {parts}.")
    use_cpu = args.use_cpu or not torch.accelerator.is_available()
    values = {
        "output_dir": args.output_dir,
        "learning_rate": args.learning_rate,
        "num_train_epochs": args.epochs,
        "max_steps": args.max_steps or -1,
        "per_device_train_batch_size": args.batch_size // (processes * accumulation),
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": args.eval_batch_size,
        "weight_decay": args.weight_decay,
        "lr_scheduler_type": args.lr_scheduler,
        "warmup_steps": 0 if args.lr_scheduler == "constant" else args.warmup,
        "train_sampling_strategy": "group_by_length" if args.group_by_length else "random",
        "bf16": args.precision == "bf16" or (args.precision == "auto" and computes_in_bf16(use_cpu)),
        "fp16": args.precision == "fp16",
        # Without it a Trainer refuses bf16 on a machine that has no other device.
        "use_cpu": use_cpu,
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "seed": args.seed,
        # For models that divide by the number of tokens in all processes. The stock classifiers do not, and the
        # Trainer would multiply their loss by the number of processes.
        "average_tokens_across_devices": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    made = TrainingArguments(**values | changes)
    if (found := made.train_batch_size * processes * accumulation) != args.batch_size:
        raise SystemExit(
            f"{made.n_gpu} devices in {processes} processes would make batches of {found}, not of --batch_size "
            f"{args.batch_size}: start one process per device, with `accelerate launch`."
        )
    return made


def chosen_method(args: StudyArguments) -> Method:
    """
    The method that the arguments name.

    Raises:
        `SystemExit`: There is no such method, or it has no such option.
    """
    try:
        return make_method(args.method, seed=args.seed, **args.options_of_method())
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--method {args.method}: {error}") from None


def train(
    method: Method | None,
    model: PreTrainedModel,
    data: TaskData,
    args: StudyArguments,
    *,
    recipe: str,
    after: Callable[[Trainer], dict[str, Any]] | None = None,
    trainer_class: type[Trainer] = Trainer,
    accumulation: int = 1,
) -> RunRecord:
    """
    Trains, evaluates, saves what the method needs beside the base, and writes `<output_dir>/run.json`.

    Args:
        method ([`Method`], *optional*): How to adapt the model; the one that `args` name by default.
        model ([`~transformers.PreTrainedModel`]): A stock model with a head for the task.
        data ([`TaskData`]): The task.
        args ([`StudyArguments`]): All the arguments of the recipe.
        recipe (`str`): Its name, for the record.
        after (`Callable`, *optional*): Called with the Trainer when it has been trained, on every process; what it
            returns is added to the record's notes.
        trainer_class (`type`, *optional*, defaults to [`~transformers.Trainer`]): What trains.
        accumulation (`int`, *optional*, defaults to 1): Parts of a process's batch that are computed one by one.

    Returns:
        [`RunRecord`]: The same on every process; the files are written by the first.

    Raises:
        [`EngineError`]: What runs is not what `accelerate launch` was asked for.
    """
    method = chosen_method(args) if method is None else method
    commit, dirty = checkout()  # of the code that has been read; the files may change while it runs
    revision = getattr(model.config, "_commit_hash", None)
    trainer_args = training_arguments(args, accumulation=accumulation)
    model = method.prepare(model)
    evaluation = Evaluation(data, args.eval_every)
    trainer = trainer_class(
        model=model,
        args=trainer_args,
        train_dataset=data.train,
        data_collator=data.collator,
        processing_class=data.tokenizer,
        callbacks=[*method.callbacks(), evaluation],
        preprocess_logits_for_metrics=data.shrink,
        **method.trainer_kwargs(model, trainer_args),
    )
    evaluation.trainer = trainer
    engine = check_engine(trainer)
    if engine.name not in (SINGLE, DDP):
        raise SystemExit(
            f"The study's methods train whole models, in one process or under DDP; this is {engine}. Take "
            "recipes/accelerate/ddp.yaml, or wrap a BitFit model yourself as recipes/accelerate/fsdp2.yaml says."
        )
    # Not always what the arguments say: a launcher's config may ask for more.
    precision = trainer.accelerator.mixed_precision.replace("no", "fp32")
    count = method.trainable(model)

    trainer.train()
    evaluation.evaluate(trainer.state)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    for entry in evaluation.history:
        entry["train_loss"] = losses.get(entry["step"])
    notes = data.notes | (after(trainer) if after is not None else {})

    folder = Path(args.output_dir)
    size = 0
    if trainer.is_world_process_zero():
        size = method.save(model, folder)
        data.tokenizer.save_pretrained(folder)
    best = evaluation.best()
    name = public_name(args.model_name_or_path)
    record = RunRecord(
        recipe=recipe,
        task=data.name,
        model=name,
        method=args.method,
        learning_rate=args.learning_rate,
        seed=args.seed,
        config=without_paths(asdict(args) | {"model_name_or_path": name}),
        history=evaluation.history,
        metric=data.metric,
        metrics={"final": evaluation.history[-1]["eval"], "best": best["eval"]},
        best_epoch=best["epoch"],
        trainable={"body": count.body, "head": count.head, "base": count.base},
        bytes=size,
        seconds=evaluation.history[-1]["seconds"],
        processor_seconds=evaluation.history[-1]["processor_seconds"],
        data={
            "source": data.source,
            "rows": {"train": len(data.train), **{key: len(split.rows) for key, split in data.evaluation.items()}},
        },
        model_revision=revision,
        commit=commit,
        dirty=dirty,
        hardware=hardware(engine.processes, trainer_args.device) | {"engine": engine.name, "precision": precision},
        notes=notes,
    )
    record = broadcast_object_list([record])[0]
    if trainer.is_world_process_zero():
        record.write(folder / "run.json")
    return record


def run_recipe(
    run: Callable[[Any], RunRecord], arguments: type[StudyArguments], argv: list[str] | None, description: str
) -> RunRecord:
    """
    A recipe from the command line: reads the arguments, does the run and prints it in one line.

    Args:
        run (`Callable`): Does one run.
        arguments (`type`): The recipe's arguments.
        argv (`list[str]`, *optional*): Those of the process by default.
        description (`str`): The recipe's docstring; its first line is shown by `--help`.
    """
    args = parse(arguments, argv, description=description.splitlines()[0])
    transformers.logging.set_verbosity_error()  # each fresh head is announced otherwise
    record = run(args)
    report(record)
    return record


def report(record: RunRecord) -> None:
    """Prints a run in one line, on the first process."""
    if PartialState().is_main_process:
        print(summary(record))


def summary(record: RunRecord) -> str:
    """A run in one line."""
    trained = record.trainable["body"] + record.trainable["head"]
    metrics = json.dumps({name: round(value, 4) for name, value in record.metrics["best"].items()})
    return (
        f"{record.task}, {record.method}, learning rate {record.learning_rate:g}, seed {record.seed}: {metrics} "
        f"at epoch {record.best_epoch:g}; {trained:,} parameters ({trained / record.trainable['base']:.2%} of the "
        f"base), {record.bytes / 1e3:.0f} kB, {record.seconds:.0f} s"
    )
