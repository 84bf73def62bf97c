"""[`ServedTasks`]: the tasks of a server, added and removed while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..bank import TaskBank
from ..bank.predict import TextTask
from ..card.metrics import add_card, card_metrics
from ..delta.value import BiasDelta
from ..errors import BitFitError, ServingError
from ..storage.fetch import fetch_delta
from ..storage.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from .schemas import TaskDescription
from .settings import TASK_NAME

_SAMPLE = ("Who is it?", "We are.")


class ServedTasks:
    """The tasks of a server.

    Args:
        bank ([`TaskBank`]): With a tokenizer.
    """

    def __init__(self, bank: TaskBank) -> None:
        self.bank = bank
        self._infos: dict[str, TaskDescription] = {}

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def infos(self) -> list[TaskDescription]:
        """All tasks, in the order in which they came."""
        return list(self._infos.values())

    def info(self, name: str) -> TaskDescription | None:
        """One task."""
        return self._infos.get(name)

    def add(self, name: str, source: str, *, revision: str | None = None) -> TaskDescription:
        """Adds a task, or puts it in the place of that of its name. Requests go on meanwhile.

        The first text of its class is run here, so that no request pays for it.

        Raises:
            [`BitFitError`]: It cannot be read, does not fit, or takes no texts; the tasks are as they were.
        """
        if not TASK_NAME.fullmatch(name):
            raise ServingError(f"A task's name has letters, digits, `.`, `_` and `-`, 128 at most; got {name!r:.140}.")
        fetched = fetch_delta(source, revision=revision)
        delta = BiasDelta.from_folder(fetched.folder, where=source)
        if name in self._infos:
            self._try(f"{name} (trial)", delta, keep=False)  # a name that no request can have
        # From the folder: a bank that drops tasks from memory reads them again.
        task = self._try(name, fetched.folder, keep=True)
        if fetched.commit is not None:
            add_card(fetched.folder, source)
        self._infos[name] = _describe(task, delta, fetched.folder)
        return self._infos[name]

    def remove(self, name: str) -> None:
        """Removes a task. Requests that run with it end as they began.

        Raises:
            [`UnknownTaskError`]: There is none.
        """
        self.bank.remove_task(name)
        self._infos.pop(name, None)

    def _try(self, name: str, source: BiasDelta | Path, *, keep: bool) -> TextTask:
        """Adds a task to the bank and runs a text, which has to work; it stays if it does and is wanted."""
        self.bank.add_task(name, source, replace=True)
        try:
            text = self.bank.encode(_SAMPLE, name)
            self.bank.run([text])
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                self.bank.remove_task(name)
        return text.task


def task_folders(folder: str) -> dict[str, str]:
    """The tasks in `--tasks-dir`: its folders with a delta, by their names.

    Raises:
        [`ServingError`]: It is no folder.
    """
    if not Path(folder).is_dir():
        raise ServingError(f"--tasks-dir {folder}: there is no such folder.")
    found = sorted(path for path in Path(folder).iterdir() if (path / CONFIG_FILE).is_file())
    return {path.name: str(path) for path in found}


def add_all(tasks: ServedTasks, sources: Iterable[tuple[str, str]]) -> list[str]:
    """Adds tasks, and returns what is wrong with those that cannot be."""
    problems = []
    for name, source in sources:
        try:
            tasks.add(name, source)
        except BitFitError as error:
            problems.append(f"{name}: {' '.join(str(error).split())}")
    return problems


def _describe(task: TextTask, delta: BiasDelta, folder: Path) -> TaskDescription:
    assert task.name is not None
    assert task.kind.tag is not None
    labels = task.labels
    return TaskDescription(
        name=task.name,
        type=task.kind.tag,
        model_class=task.model.name,
        id2label=None if labels is None else {str(index): label for index, label in labels.id2label.items()},
        problem_type=None if labels is None else labels.problem_type,
        metrics=card_metrics(folder / CARD_FILE),
        parameters=delta.num_parameters(head=True),
        bytes=sum((folder / file).stat().st_size for file in (CONFIG_FILE, WEIGHTS_FILE)),
    )
