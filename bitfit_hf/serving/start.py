"""From settings to an engine with its tasks."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

from transformers import AutoModel, AutoTokenizer

from ..bank import TaskBank
from ..errors import ServingError, collect
from .embedding import Pooling, pooling_of
from .engine import Engine
from .settings import Settings
from .tasks import add_all, task_folders


def load_engine(settings: Settings) -> tuple[Engine, list[str]]:
    """Loads the base and the tasks.

    A task that cannot be loaded takes nobody with it: it is reported, and the server starts with the others. It does
    not start where none of those asked for is left, nor with `strict`.

    Args:
        settings ([`Settings`]): The options.

    Returns:
        `tuple[Engine, list[str]]`: The engine, and one line for each task that is left out.

    Raises:
        [`ServingError`]: The base cannot be loaded; or the tasks cannot be, see above.
    """
    sources = first_tasks(settings)
    engine = Engine(load_bank(settings), settings, pooling=load_pooling(settings))
    problems = add_all(engine.tasks, sources.items())
    check_loaded(engine, asked=len(sources), problems=problems)
    return engine, problems


def first_tasks(settings: Settings) -> dict[str, str]:
    """The tasks to start with: their sources by their names.

    Raises:
        [`ServingError`]: `tasks_dir` is no folder.
    """
    return {**(task_folders(settings.tasks_dir) if settings.tasks_dir else {}), **settings.tasks}


def check_loaded(engine: Engine, *, asked: int, problems: list[str]) -> None:
    """Whether a server may start with the tasks that could be loaded.

    Args:
        engine ([`Engine`]): With these.
        asked (`int`): How many there should be.
        problems (`list[str]`): What is wrong with the others.

    Raises:
        [`ServingError`]: It may not.
    """
    settings = engine.settings
    if asked and (not len(engine.tasks) or (problems and settings.strict)):
        raise ServingError(f"These tasks cannot be loaded:{collect(problems)}")
    if settings.default_task is not None and settings.default_task not in engine.tasks:
        raise ServingError(f"--default-task {settings.default_task!r} is none of the tasks that are served.")


def load_pooling(settings: Settings) -> Pooling:
    """How embeddings are made: as the settings say, or the base."""
    return cast(Pooling, settings.pooling) or pooling_of(settings.base, settings.base_revision)


def load_bank(settings: Settings) -> TaskBank:
    """The base in a bank, without tasks.

    Raises:
        [`ServingError`]: It cannot be loaded.
    """
    options: dict[str, Any] = {
        "revision": settings.base_revision or "main",
        "local_files_only": Path(settings.base).is_dir(),
        "trust_remote_code": False,
    }
    try:
        dtype = "float32" if settings.engine == "onnxruntime" else "auto"
        model = AutoModel.from_pretrained(settings.base, dtype=dtype, **options).eval()
        tokenizer = AutoTokenizer.from_pretrained(settings.base, **options)
    except Exception as error:  # whatever is wrong with a user's files
        raise ServingError(f"{settings.base} cannot be loaded: {error}") from error
    return TaskBank(model, tokenizer, max_tasks=settings.max_tasks, engine=settings.engine, graph=settings.graph)


def settle() -> None:
    """Tells Python's garbage collector that what has been loaded will stay; for a process that does nothing but serve.

    A base and its libraries are half a million objects. To look through them takes a quarter of a second, in which
    nothing is answered.
    """
    gc.collect()
    gc.freeze()
