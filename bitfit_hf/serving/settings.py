"""[`Settings`]: all options of the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ServingError, collect

# What a task may be called: it is a part of an address, and a name in logs.
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
POOLINGS = ("mean", "cls")
ENGINES = ("torch", "onnxruntime")
_POSITIVE = (
    "max_batch_tokens",
    "max_concurrent_requests",
    "max_client_batch_size",
    "max_input_chars",
    "max_body_bytes",
    "max_batch_requests",
    "max_tasks",
)


@dataclass(frozen=True)
class Settings:
    """
    All options of the server. Those that Text Embeddings Inference has too have its names.

    Args:
        base (`str`): Folder or Hub repo of the base model.
        base_revision (`str`, *optional*): Of its repo.
        tasks (`Mapping[str, str]`, *optional*): Tasks to start with: folder or Hub repo by name.
        tasks_dir (`str`, *optional*): A folder of deltas: each folder in it is a task of the folder's name.
        strict (`bool`, *optional*, defaults to `False`): Does not start where one of the tasks cannot be loaded.
            Otherwise they are reported and left out, as long as one is left.
        default_task (`str`, *optional*): What a request that names no task is for. Where there is one task, that
            is it.
        allow_source (`tuple[str, ...]`, *optional*):
            What tasks may be added from while the server runs: folders (with all in them), and patterns of Hub repos
            such as `"user/*"`, where a star stands for anything but a slash.
        admin_token (`str`, *optional*): Who has it may add and remove tasks. Without it, nobody may.
        api_key (`str`, *optional*): Guards everything but the health check and the two pages, which hold no data.
        max_tasks (`int`, *optional*): Tasks in memory at a time, see [`TaskBank`].
        max_batch_tokens (`int`): Tokens in a batch, padding included.
        max_batch_requests (`int`, *optional*): Texts in a batch.
        max_wait_ms (`float`): How many milliseconds a text waits for others before it runs alone.
        max_concurrent_requests (`int`): Requests that may be under way; the next one is answered with 429.
        max_client_batch_size (`int`): Texts in one request.
        max_input_chars (`int`): Characters in one text.
        max_body_bytes (`int`): Bytes in the body of a request.
        auto_truncate (`bool`): Cuts long texts where the request does not say whether to.
        engine (`str`): What computes the backbone: `"torch"` or `"onnxruntime"`, see [`TaskBank`].
        graph (`str`, *optional*): For `"onnxruntime"`: the folder that `bitfit export BASE --onnx` wrote.
        pooling (`str`, *optional*): `"mean"` or `"cls"`: how an embedding is made of a text's tokens. By default what
            the base's `1_Pooling/config.json` says, or the mean.
        host (`str`), port (`int`): Where to listen.
        drain_seconds (`int`): How long requests under way may take when the server is told to end.
    """

    base: str
    base_revision: str | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    tasks_dir: str | None = None
    strict: bool = False
    default_task: str | None = None
    allow_source: tuple[str, ...] = ()
    admin_token: str | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    max_tasks: int | None = None
    max_batch_tokens: int = 4096
    max_batch_requests: int | None = None
    max_wait_ms: float = 2.0
    max_concurrent_requests: int = 512
    max_client_batch_size: int = 32
    max_input_chars: int = 100_000
    max_body_bytes: int = 2_000_000
    auto_truncate: bool = False
    engine: str = "torch"
    graph: str | None = None
    pooling: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    drain_seconds: int = 30

    def __post_init__(self) -> None:
        problems = [
            f"{name} is a positive number, got {value}"
            for name in _POSITIVE
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not 0 <= self.max_wait_ms <= 1000:
            problems.append(f"max_wait_ms is between 0 and 1000, got {self.max_wait_ms}")
        if self.pooling is not None and self.pooling not in POOLINGS:
            problems.append(f"pooling is one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.engine not in ENGINES:
            problems.append(f"engine is one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.graph is not None and self.engine != "onnxruntime":
            problems.append(f"graph is for the engine onnxruntime, and the engine is {self.engine}")
        problems += [f"a task may not be called {name!r}" for name in self.tasks if not TASK_NAME.fullmatch(name)]
        for name in ("admin_token", "api_key"):
            token = getattr(self, name)
            if token is not None and (not token.strip() or not token.isascii() or not token.isprintable()):
                problems.append(f"{name} is a word of printable ASCII characters")
        if self.admin_token is not None and self.admin_token == self.api_key:
            problems.append("admin_token and api_key are the same: whoever may ask could add tasks")
        if problems:
            raise ServingError(f"The server cannot start with these settings:{collect(problems)}")
