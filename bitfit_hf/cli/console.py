"""What every command does alike: one line on stderr for a mistake, clean output, libraries that keep quiet."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import BitFitError
from .text import one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

# Releases of typer bring a click of their own or use the installed one; the bases of typer's own error are right in
# both.
_UsageError: Any = typer.BadParameter.__base__
_ClickException: Any = _UsageError.__base__
_CHATTY = ("transformers", "huggingface_hub", "peft", "accelerate")
_PIPED_WIDTH = 120


class Command(TyperCommand):
    """A command during which libraries print nothing of their own."""

    def invoke(self, ctx: Any) -> Any:
        with quiet():
            complete_import()
            return super().invoke(ctx)


class CommandLine(TyperGroup):
    """The commands; a user's mistake ends in one line on stderr and exit code 1, wherever it is noticed."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except _ClickException as error:
            _fail_usage(error)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _ClickException as error:
            _fail_usage(error)
        except BrokenPipeError:
            raise  # the reader of a pipe had enough; typer ends quietly
        except Exception as error:
            if ctx.params["debug"] or not _is_users_mistake(error):
                raise
            fail(str(error))


def _is_users_mistake(error: Exception) -> bool:
    if isinstance(error, (BitFitError, OSError)):
        return True
    if not isinstance(error, ValueError):
        return False
    from huggingface_hub.errors import HFValidationError  # takes longer to import than all the rest of a usage error

    return isinstance(error, HFValidationError)


def _fail_usage(error: Any) -> NoReturn:
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "bitfit"
    fail(f"{error.format_message().rstrip('.')}. See '{command} --help'.")


def fail(message: str) -> NoReturn:
    """Ends the program with `message` on one line of stderr and exit code 1."""
    typer.echo(f"bitfit: error: {one_line(message)}", err=True)
    raise typer.Exit(1)


def complete_import() -> None:
    """Imports what `import bitfit_hf` imports, and registers the method with PEFT."""
    from bitfit_hf import BitFitConfig  # noqa: F401  # any of its names will do


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps libraries from printing. Warnings meant for users are shown at the end, one line each.

    Downloads show their progress where stderr is a terminal. Everything is put back afterwards.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    loading_bars, download_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            transformers_logging.disable_progress_bar()
            if download_bars and sys.stderr.isatty():
                enable_progress_bars()
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
            if loading_bars:
                transformers_logging.enable_progress_bar()
            (enable_progress_bars if download_bars else disable_progress_bars)()
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        typer.echo(f"bitfit: warning: {one_line(message)}", err=True)


def emit(
    values: dict[str, Any], as_json: bool, render: Callable[[dict[str, Any]], list[RenderableType]] | None = None
) -> None:
    """Prints the result of a command on stdout.

    Args:
        values (`dict[str, Any]`): The result, ready for JSON.
        as_json (`bool`): Prints it as one JSON object.
        render (`Callable`, *optional*): What to print otherwise; by default names and values.
    """
    if as_json:
        typer.echo(json.dumps(values, indent=2, allow_nan=False))
        return
    from rich.console import Console

    from .tables import result_table

    # Names come from files: they are no markup.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    for renderable in (render or result_table)(values):
        console.print(renderable)
