"""What every command does alike: one line on stderr for a mistake, clean output, libraries that keep quiet."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import BitFitError
from .text import one_line

# Releases of typer bring a click of their own or use the installed one; the bases of typer's own error are right in
# both.
_UsageError: Any = typer.BadParameter.__base__
_ClickException: Any = _UsageError.__base__
_ORDER = ("train", "eval", "inspect", "plot", "diff", "push", "serve", "merge", "extract", "export")
_CHATTY = ("transformers", "huggingface_hub", "peft", "accelerate")


class OnMismatch(str, Enum):
    """What to do with a delta that was trained on another checkpoint."""

    RAISE = "raise"
    WARN = "warn"
    IGNORE = "ignore"


class GroupedHelp:
    """Help in sections, as plain text: it is wrapped between words, and no option's name is cut."""

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        """Writes the parameters, by the panel that they name."""
        sections: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for name, records in sorted(sections.items(), key=lambda item: item[0] == "Options"):  # the general ones last
            with formatter.section(name):
                formatter.write_dl(records)


class Command(GroupedHelp, TyperCommand):
    """A command during which libraries print nothing of their own."""

    def invoke(self, ctx: Any) -> Any:
        with quiet():
            complete_import()
            return super().invoke(ctx)


class CommandLine(TyperGroup):
    """
    The commands. A user's mistake ends in one line on stderr, wherever it is noticed: with exit code 2 one in the
    command itself, which is told before anything is imported, and with 1 any other.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """From the first that a user needs to the last; those that are not named here come at the end."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        try:
            self._check_words(info_name, args, parent)
            return super().make_context(info_name, args, parent, **extra)
        except _ClickException as error:
            _fail_usage(error)

    def _check_words(self, info_name: str | None, args: list[str], parent: Any) -> None:
        """Raises for commands and options that do not exist. Newer typers import pydantic to look at values."""

        def context(command: Any, name: str | None, above: Any) -> Any:
            return command.context_class(command, info_name=name, parent=above, **command.context_settings)

        own = context(self, info_name, parent)
        rest = self.make_parser(own).parse_args(list(args))[1]
        if rest:
            name, command, others = self.resolve_command(own, rest)
            if command is not None:
                command.make_parser(context(command, name, own)).parse_args(others)

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
    message = error.format_message()
    end = "" if message.endswith((".", "?", "!")) else "."
    fail(f"{message}{end} See '{command} --help'.", code=2)


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Ends the program with `message` on one line of stderr."""
    typer.echo(f"bitfit: error: {one_line(message)}", err=True)
    raise typer.Exit(code)


def complete_import() -> None:
    """Imports what `import bitfit_hf` imports, and registers the method with PEFT."""
    from bitfit_hf import BitFitConfig  # noqa: F401  # any of its names will do


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps libraries from printing. Warnings meant for users are shown at the end, one line each.

    Downloads show their progress where stderr is a terminal. Everything is put back afterwards.
    """
    import logging

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
    values: dict[str, Any],
    as_json: bool,
    render: Callable[[dict[str, Any]], list[str]] | None = None,
    *,
    brief: str | None = None,
) -> None:
    """Prints the result of a command on stdout.

    Args:
        values (`dict[str, Any]`): The result, ready for JSON.
        as_json (`bool`): Prints it as one JSON object.
        render (`Callable`, *optional*): What to print otherwise; by default names and values.
        brief (`str`, *optional*): The one thing to print under `--quiet`, such as the folder that was written.
    """
    if as_json:
        import json

        typer.echo(json.dumps(values, indent=2, allow_nan=False))
        return
    if brief is not None:
        typer.echo(brief)
        return
    from .tables import result_table

    for text in (render or result_table)(values):
        typer.echo(text)  # without colours where stdout is no terminal
