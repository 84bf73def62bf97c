"""Training: BitFit with a stock Trainer and the callback, and the head on a frozen body to compare with."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ...config import BitFitConfig
from ...errors import CheckpointError
from ...tables.encoding import Encoded, encode
from ...tables.metrics import LOWER_IS_BETTER, Answers, main_metric, metric_names, scores
from ...tables.problem import Kind, Problem
from ...terms import head_modules, part_tensors
from ...trainer import BitFitCallback
from ...trainer.checks import adapter_configs
from ...trainer.rates import HEAD, term_scale
from ...tuner.state import delta_parameters, head_tensors
from .base import Base, output_layer
from .data import Scale, Task
from .progress import Narrator, ShowProgress
from .settings import EVAL_BATCH_SIZE, WARMUP, Settings

# Updates from one evaluation to the next, where an epoch has more of them.
EVALUATE_EVERY = 1_000
ADAPTER = "default"


@dataclass
class Outcome:
    """
    How a training went.

    Args:
        scores (`dict[str, float]`): Of the best evaluation.
        answers ([`Answers`], *optional*): Of the best evaluation, where the model is that of then.
        best_epoch (`float`): When that was.
        epochs (`float`), updates (`int`), seconds (`float`): Of the training.
        biases (`int`), head (`int`), base (`int`): Parameters trained, and of the base without its head.
        interrupted (`bool`): Whether Ctrl-C has ended it.
    """

    scores: dict[str, float]
    answers: Answers | None
    best_epoch: float
    epochs: float
    updates: int
    seconds: float
    biases: int = 0
    head: int = 0
    base: int = 0
    interrupted: bool = False


@dataclass
class Run:
    """
    One task on one base.

    Args:
        task ([`Task`]): The rows.
        base ([`Base`]): The base.
        settings ([`Settings`]): How to train.
        config ([`BitFitConfig`]): What to tune.
        card (`dict[str, Any]`): Facts for the model card.
        scratch (`Path`): A folder for checkpoints, the same in all processes; it is removed by [`Run.clean_up`].
        narrator ([`Narrator`]): Says what is going on.
        max_length (`int`): In tokens.
    """

    task: Task
    base: Base
    settings: Settings
    config: BitFitConfig
    card: dict[str, Any]
    scratch: Path
    narrator: Narrator
    max_length: int
    scale: Scale = field(init=False)
    output: str = field(init=False, default="")
    train: Encoded = field(init=False)
    evaluation: Encoded = field(init=False)

    def __post_init__(self) -> None:
        self.scale = Scale.of(self.task.problem, self.task.train)
        self._encode()

    @property
    def problem(self) -> Problem:
        """The task's kind and labels."""
        return self.task.problem

    @property
    def saved(self) -> Path:
        """Where the trained delta is, until it is published."""
        return self.scratch / "delta"

    @property
    def metric(self) -> str:
        """What the best evaluation is chosen by."""
        return main_metric(self.problem)

    def _encode(self) -> None:
        tokenizer, length = self.base.tokenizer, self.max_length
        train, evaluation = self.scale.inward(self.task.train), self.scale.inward(self.task.evaluation)
        self.train = encode(train, self.problem, tokenizer, length, hub=self.task.hub)
        self.evaluation = encode(evaluation, self.problem, tokenizer, length, hub=self.task.eval_hub)

    # --- the two trainings ---

    def bitfit(self) -> Outcome:
        """Trains the biases and the head, takes the model back to its best evaluation, and saves it."""
        model = self.base.model(self.settings.seed)
        if self.problem.kind is Kind.REGRESSION:
            self.output, layer = output_layer(model)
            if layer.bias is None:
                self.scale = Scale(0.0, self.scale.deviation)  # nothing in the head could take up a mean
                self._encode()
        callback = BitFitCallback(
            self.config,
            head_learning_rate=self.settings.head_learning_rate,
            lr_scale=self.settings.lr_scale,
            dropout=self.settings.dropout,
            card=self.card,
        )
        trainer, keep = self._trainer(model, "bitfit", "BitFit", [callback], best=True)
        outcome = self._train(trainer, keep)
        found = trainer.evaluate()
        outcome.scores, outcome.answers = self._own(found), keep.answers
        self._in_own_unit(model)
        outcome.biases = sum(delta.numel() for delta in delta_parameters(model, ADAPTER).values())
        outcome.base = adapter_configs(model)[ADAPTER].base_num_parameters or 0
        outcome.head = sum(tensor.numel() for tensor in head_tensors(model, ADAPTER).values())
        trainer.save_model(str(self.saved))
        return outcome

    def frozen(self) -> Outcome:
        """Trains the head alone: what the base gives away without being tuned."""
        model = self.base.model(self.settings.seed)
        model.requires_grad_(False)
        for tensor in part_tensors(model, head_modules(model)).values():
            tensor.requires_grad_(tensor.is_floating_point())
        trainer, keep = self._trainer(model, "frozen", "Frozen body", [], best=False)
        # The head learns as fast as it does beside the biases.
        rate = trainer.args.learning_rate * term_scale(self.settings.lr_scale)[HEAD]
        trainer.args.learning_rate = self.settings.head_learning_rate or rate
        outcome = self._train(trainer, keep)
        entries = [entry for entry in trainer.state.log_history if f"eval_{self.metric}" in entry]
        pick = min if self.metric in LOWER_IS_BETTER else max
        best = pick(entries, key=lambda entry: entry[f"eval_{self.metric}"])
        outcome.scores, outcome.best_epoch = self._own(best), best["epoch"]
        return outcome

    # --- what they share ---

    def _trainer(
        self, model: PreTrainedModel, name: str, title: str, callbacks: list[TrainerCallback], *, best: bool
    ) -> tuple[Trainer, _Keep]:
        keep = _Keep(self.problem, self.scale, self.evaluation.lost_words)
        alone = processes() == 1
        keep.show = ShowProgress(self.narrator, title, self.metric, interruptible=alone)
        if self.settings.patience:
            callbacks = [*callbacks, EarlyStoppingCallback(self.settings.patience)]
        trainer = Trainer(
            model=model,
            args=self._arguments(name, best=best),
            train_dataset=self.train.rows,  # type: ignore[arg-type]  # whatever has a length and rows
            eval_dataset=self.evaluation.rows,  # type: ignore[arg-type]
            data_collator=collator(self.problem, self.base.tokenizer),
            processing_class=self.base.tokenizer,
            compute_metrics=keep,
            preprocess_logits_for_metrics=shrink(self.problem),
            callbacks=[*callbacks, keep.show],
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.args.world_size != processes():
            raise CheckpointError(
                f"{processes()} processes were started, but they know of {trainer.args.world_size}: start them with "
                "`accelerate launch`, and without a GPU with ACCELERATE_USE_CPU=1 in the environment."
            )
        return trainer, keep

    def _arguments(self, name: str, *, best: bool) -> TrainingArguments:
        rows, settings = len(self.task.train), self.settings
        epoch = math.ceil(rows / settings.batch_size)
        precision = settings.precision or default_precision()
        return trainer_arguments(
            str(self.scratch / name),
            learning_rate=settings.learning_rate,
            num_train_epochs=settings.planned_epochs(rows),
            per_device_train_batch_size=settings.batch_size // processes(),
            lr_scheduler_type="linear",
            warmup_steps=WARMUP,
            eval_strategy="steps" if epoch > EVALUATE_EVERY else "epoch",
            eval_steps=EVALUATE_EVERY if epoch > EVALUATE_EVERY else None,
            logging_strategy="epoch",
            save_strategy="best" if best else "no",
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=best,
            metric_for_best_model=self.metric,
            greater_is_better=self.metric not in LOWER_IS_BETTER,
            seed=settings.seed,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            # The stock classifiers take no mean over the tokens of all processes.
            average_tokens_across_devices=False,
        )

    def _train(self, trainer: Trainer, keep: _Keep) -> Outcome:
        begin = time.perf_counter()
        try:
            trainer.train()
        finally:
            assert keep.show is not None
            keep.show.close()
        state = trainer.state
        best = next((e["epoch"] for e in state.log_history if e.get("step") == state.best_global_step), state.epoch)
        return Outcome(
            {},
            None,
            best or 0.0,
            state.epoch or 0.0,
            state.global_step,
            time.perf_counter() - begin,
            interrupted=keep.show.interrupted,
        )

    def _own(self, found: dict[str, float]) -> dict[str, float]:
        """The metrics among what a Trainer says of an evaluation, in their order."""
        return {name: float(found[f"eval_{name}"]) for name in metric_names(self.problem)}

    @torch.no_grad()
    def _in_own_unit(self, model: PreTrainedModel) -> None:
        """Lets the head of a regression answer in the label's own unit: it takes up the mean and the deviation."""
        if self.scale == Scale():
            return
        tensors = head_tensors(model, ADAPTER)
        tensors[f"{self.output}.weight"].mul_(self.scale.deviation)
        if f"{self.output}.bias" in tensors:
            tensors[f"{self.output}.bias"].mul_(self.scale.deviation).add_(self.scale.mean)

    def clean_up(self) -> None:
        """Removes the checkpoints."""
        if is_first():
            shutil.rmtree(self.scratch, ignore_errors=True)


class _Keep:
    """Computes the metrics for a Trainer, and keeps the answers that they are about."""

    def __init__(self, problem: Problem, scale: Scale, lost_words: int) -> None:
        self.problem = problem
        self.scale = scale
        self.lost_words = lost_words
        self.answers: Answers | None = None
        self.show: ShowProgress | None = None

    def __call__(self, prediction: Any) -> dict[str, float]:
        right, given = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
        if self.problem.kind is Kind.REGRESSION:
            right, given = (
                np.asarray(x, dtype=np.float64) * self.scale.deviation + self.scale.mean for x in (right, given)
            )
        self.answers = Answers(right, given, self.lost_words)
        return scores(self.problem, self.answers)


def trainer_arguments(folder: str, **values: Any) -> TrainingArguments:
    """The arguments of a Trainer that says nothing of its own and uses one device.

    Args:
        folder (`str`): Its output folder.
        values: Other arguments.
    """
    args = TrainingArguments(
        folder,
        per_device_eval_batch_size=EVAL_BATCH_SIZE,
        use_cpu=not accelerator(),
        dataloader_pin_memory=accelerator(),
        disable_tqdm=True,
        report_to="none",
        **values,
    )
    if processes() == 1:
        args._n_gpu = min(args.n_gpu, 1)  # one process uses one device; `accelerate launch` starts one for each
    return args


def collator(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Makes batches of encoded rows."""
    if problem.kind is Kind.TOKENS:
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorWithPadding(tokenizer)


def shrink(problem: Problem) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """What metrics need of the logits, instead of all of them for all rows: a Trainer's `preprocess_logits_…`."""

    def answers(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        if problem.kind is Kind.REGRESSION:
            return logits[:, 0].float()
        if problem.kind is Kind.MULTI_LABEL:
            return (logits > 0).float()
        return logits.argmax(-1)

    return answers


def processes() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def accelerator() -> bool:
    """Whether there is another device than the CPU. Without one a Trainer has to be told to use the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return False
    return torch.accelerator.is_available()


def default_precision() -> str:
    """bf16 where an accelerator computes in it, else fp32: a CPU may be slower in bf16."""
    return "bf16" if torch.cuda.is_available() and accelerator() and torch.cuda.is_bf16_supported() else "fp32"
