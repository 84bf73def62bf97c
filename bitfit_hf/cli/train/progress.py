"""What is shown while a model trains: a bar on a terminal, a line for each evaluation everywhere else."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...tables.metrics import LOWER_IS_BETTER, WORDS
from ..text import wrapped


class Narrator:
    """
    Says what is going on, on stderr: stdout is for results.

    Args:
        silent (`bool`): Says nothing: `--quiet`, and all processes but the first.
    """

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent
        self.console = Console(stderr=True, highlight=False, markup=False)

    def say(self, text: str = "") -> None:
        """A line."""
        if not self.silent:
            print(text, file=sys.stderr, flush=True)

    def plan(self, lines: list[tuple[str, str]], warnings: list[str]) -> None:
        """Names and what there is to say of each, wrapped between words; then what to beware of."""
        width = max(len(name) for name, _ in lines) + 2
        for name, text in lines:
            self.say(wrapped(f"{name:<{width}}{text}", width))
        for warning in warnings:
            self.say(wrapped(f"Note: {warning}", 6))
        self.say()


class ShowProgress(TrainerCallback):
    """
    Shows how far training is, and how good the model was at the last evaluation and at its best.

    The first Ctrl-C ends training as if it had been planned so, and keeps the best evaluation; the second one ends the
    program.

    Args:
        narrator ([`Narrator`]): Where to.
        title (`str`): What is trained.
        metric (`str`): What the best evaluation is chosen by.
        interruptible (`bool`): Whether Ctrl-C may end it early; not where other processes would wait for this one.
    """

    def __init__(self, narrator: Narrator, title: str, metric: str, *, interruptible: bool) -> None:
        self.narrator = narrator
        self.title = title
        self.metric = metric
        self.interruptible = interruptible
        self.interrupted = False
        self._loss: float | None = None
        self._note = ""
        self._bar: Progress | None = None
        self._task: Any = None
        self._before: Any = None
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws the bar."""
        self._training = True
        if self.interruptible:
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        if self.narrator.silent:
            return
        if not self.narrator.console.is_terminal:
            self.narrator.say(f"{self.title}: {state.max_steps:,} updates planned")
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=self.narrator.console,
        )
        self._task = self._bar.add_task(self.title, total=state.max_steps, note="")
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the bar; ends training where the user has asked for that."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
        if self.interrupted:
            control.should_evaluate = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the loss for the next line."""
        if logs is not None and "loss" in logs:
            self._loss = logs["loss"]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Says how good the model is."""
        value = (metrics or {}).get(f"eval_{self.metric}")
        if value is None or state.global_step == 0:
            return
        best = state.best_metric  # of the evaluations before this one
        if best is None or (value < best if self.metric in LOWER_IS_BETTER else value > best):
            best = value
        self._note = f"epoch {state.epoch or 0:.3g} · {short(self.metric)} {value:.3f}, best {best:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, note=self._note)
        elif self._training and not self.narrator.silent:
            loss = "" if self._loss is None else f", loss {self._loss:.3f}"
            self.narrator.say(f"  {self._note}{loss}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the terminal and Ctrl-C back."""
        self.close()

    def close(self) -> None:
        """Takes the bar away and gives Ctrl-C back, also after an error."""
        self._training = False
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.narrator.say("Ending after this update; the best evaluation is kept. Ctrl-C again to end at once.")


def short(metric: str) -> str:
    """A metric in a word or two."""
    return WORDS.get(metric, metric).partition(" (")[0]
