"""`bitfit serve`: many tasks on one base model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .console import GroupedHelp, complete_import, quiet
from .text import printable

_SHOWN = 8  # tasks in the start line


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    """An option that is an environment variable too."""
    variable = "BITFIT_SERVE_" + names[0].lstrip("-").partition("/")[0].upper().replace("-", "_")
    return typer.Option(*names, envvar=variable, help=help, rich_help_panel=panel, **more)


TASKS, ACCESS, BATCHES, LIMITS, ADDRESS = "Tasks", "Access", "Batches", "Limits", "Address"


def serve(
    base: Annotated[
        str, typer.Argument(metavar="BASE", envvar="BITFIT_SERVE_BASE", help="Folder or Hub repo of the base model.")
    ],
    task: Annotated[
        list[str],
        _option("--task", panel=TASKS, metavar="NAME=SOURCE", help="A task: folder or Hub repo. Repeatable."),
    ] = [],  # noqa: B006  # typer makes a list of its own
    tasks_dir: Annotated[
        str | None,
        _option("--tasks-dir", panel=TASKS, metavar="DIR", help="Each folder in it with a delta is a task."),
    ] = None,
    default_task: Annotated[
        str | None, _option("--default-task", panel=TASKS, help="For requests that name none.")
    ] = None,
    strict: Annotated[
        bool, _option("--strict", panel=TASKS, help="Do not start if one of the tasks cannot be loaded.")
    ] = False,
    max_tasks: Annotated[
        int | None, _option("--max-tasks", panel=TASKS, help="Tasks in memory; others are read when asked for.")
    ] = None,
    base_revision: Annotated[str | None, _option("--base-revision", panel=TASKS, help="Of the base's repo.")] = None,
    engine: Annotated[
        str, _option("--engine", panel=TASKS, help="torch, or onnxruntime (extra onnx): a frozen graph on the CPU.")
    ] = "torch",
    graph: Annotated[
        str | None,
        _option("--graph", panel=TASKS, metavar="DIR", help="For onnxruntime: from `bitfit export BASE --onnx`."),
    ] = None,
    pooling: Annotated[
        str | None, _option("--pooling", panel=TASKS, help="For /embed: mean or cls. By default the base says.")
    ] = None,
    api_key: Annotated[
        str | None, _option("--api-key", panel=ACCESS, help="Asked of every client. Better as the variable.")
    ] = None,
    admin_token: Annotated[
        str | None, _option("--admin-token", panel=ACCESS, help="Lets its owner add and remove tasks.")
    ] = None,
    allow_source: Annotated[
        list[str],
        _option(
            "--allow-source",
            panel=ACCESS,
            metavar="DIR|PATTERN",
            help="What tasks may be added from: ./deltas, or user/*. Repeatable.",
        ),
    ] = [],  # noqa: B006
    max_batch_tokens: Annotated[
        int, _option("--max-batch-tokens", panel=BATCHES, help="Tokens in a batch, padding included.")
    ] = 4096,
    max_batch_requests: Annotated[
        int | None, _option("--max-batch-requests", panel=BATCHES, help="Texts in a batch.")
    ] = None,
    max_wait_ms: Annotated[
        float, _option("--max-wait-ms", panel=BATCHES, help="How long a text waits for others.")
    ] = 2.0,
    max_concurrent_requests: Annotated[
        int, _option("--max-concurrent-requests", panel=LIMITS, help="Under way at a time; then 429.")
    ] = 512,
    max_client_batch_size: Annotated[
        int, _option("--max-client-batch-size", panel=LIMITS, help="Texts in one request.")
    ] = 32,
    max_input_chars: Annotated[
        int, _option("--max-input-chars", panel=LIMITS, help="Characters in a text.")
    ] = 100_000,
    max_body_bytes: Annotated[int, _option("--max-body-bytes", panel=LIMITS, help="Bytes in a request.")] = 2_000_000,
    auto_truncate: Annotated[
        bool, _option("--auto-truncate", panel=LIMITS, help="Cut long texts where a request does not say.")
    ] = False,
    host: Annotated[str, _option("--host", panel=ADDRESS, help="0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, _option("--port", panel=ADDRESS, min=0, max=65535, help="0 takes a free one.")] = 8080,
    drain_seconds: Annotated[
        int, _option("--drain-seconds", panel=ADDRESS, min=0, help="For requests under way when told to end.")
    ] = 30,
) -> None:
    """Serve many tasks on one base model over HTTP.

    The wire format is that of Text Embeddings Inference. Requests of all tasks are batched together. A task that
    cannot be loaded is reported and left out. On SIGTERM the server answers what it has accepted, and ends with 0.
    Every option is an environment variable too, BITFIT_SERVE_MAX_BATCH_TOKENS for --max-batch-tokens; there, several
    values are separated by spaces.

    \b
    Examples:
      bitfit serve bert-base-uncased --task rte=user/bert-base-rte-bitfit --task cola=./cola
      bitfit serve ./bert --tasks-dir ./tasks --port 8080
      curl localhost:8080/predict -H 'Content-Type: application/json' -d '{"inputs": "Fine.", "task": "cola"}'
    """
    complete_import()
    with quiet():
        from ..serving import Settings
        from ..serving.run import listen, serve
        from ..serving.start import load_engine, settle

        settings = Settings(
            base=base,
            base_revision=base_revision,
            tasks=dict(_named(entry) for entry in task),
            tasks_dir=tasks_dir,
            strict=strict,
            default_task=default_task,
            allow_source=tuple(allow_source),
            admin_token=admin_token,
            api_key=api_key,
            max_tasks=max_tasks,
            max_batch_tokens=max_batch_tokens,
            max_batch_requests=max_batch_requests,
            max_wait_ms=max_wait_ms,
            max_concurrent_requests=max_concurrent_requests,
            max_client_batch_size=max_client_batch_size,
            max_input_chars=max_input_chars,
            max_body_bytes=max_body_bytes,
            auto_truncate=auto_truncate,
            engine=engine,
            graph=graph,
            pooling=pooling,
            host=host,
            port=port,
            drain_seconds=drain_seconds,
        )
        listening = listen(host, port)
        server, problems = load_engine(settings)
        settle()
    for problem in problems:
        typer.echo(f"bitfit: warning: left out: {printable(problem)}", err=True)
    address, bound = listening.getsockname()[:2]
    names = [info.name for info in server.tasks.infos()]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    listed = f": {', '.join(names[:_SHOWN])}{more}" if names else ""
    shown = f"[{address}]" if ":" in address else address
    line = f"Serving {len(names)} tasks on {Path(base).name} at http://{shown}:{bound}{listed}"
    serve(server, listening, ready=lambda: typer.echo(line))
    typer.echo(f"Ended. {server.answered} of {server.accepted} accepted requests were answered.")


def _named(entry: str) -> tuple[str, str]:
    name, equals, source = entry.partition("=")
    if not equals or not name or not source:
        raise typer.BadParameter(f"--task is NAME=SOURCE, got {entry!r}")
    return name, source


class _Serve(GroupedHelp, TyperCommand):
    """It is no [`Command`](console.py): a server runs on, and its libraries may speak."""


def add_to(app: typer.Typer) -> None:
    """Makes it a command of `app`."""
    app.command(cls=_Serve)(serve)
