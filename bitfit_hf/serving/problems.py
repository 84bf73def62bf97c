"""What a client is told when something goes wrong: a status, one sentence, and nothing of the server's inside."""

from __future__ import annotations

import logging
import secrets
from http import HTTPStatus

from starlette.responses import JSONResponse

from ..errors import (
    BaseModelMismatchError,
    BitFitError,
    ConfigError,
    DeltaFormatError,
    DeltaIOError,
    DeltaMismatchError,
    DeltaNotFoundError,
    TaskBankError,
    TextTooLongError,
    UnknownTaskError,
)

logger = logging.getLogger("bitfit_hf.serving")

# The first five are those of Text Embeddings Inference.
VALIDATION, TOKENIZER, BACKEND, OVERLOADED, UNHEALTHY = "Validation", "Tokenizer", "Backend", "Overloaded", "Unhealthy"
NOT_FOUND, UNAUTHORIZED, FORBIDDEN = "NotFound", "Unauthorized", "Forbidden"
ERROR_TYPES = (VALIDATION, TOKENIZER, BACKEND, OVERLOADED, UNHEALTHY, NOT_FOUND, UNAUTHORIZED, FORBIDDEN)

CLIENT_LEFT = 499  # never sent: nobody is there; counted

# What is wrong with a delta, said without the names of files that the error's own message holds.
_OF_A_DELTA: tuple[tuple[type[BitFitError], str], ...] = (
    (BaseModelMismatchError, "The delta was trained on another checkpoint than the one that is served."),
    (DeltaMismatchError, "The delta does not fit the model that is served."),
    (DeltaNotFoundError, "There is no delta at this source."),
    (DeltaIOError, "The source could not be read."),
    (DeltaFormatError, "The delta's files are damaged or incomplete."),
    (ConfigError, "The delta's configuration is not valid."),
    (BitFitError, "The delta cannot be served."),
)


class Problem(Exception):
    """The answer to a request that cannot be served.

    Args:
        status (`int`): The HTTP status.
        error (`str`): One sentence for the client.
        error_type (`str`): One of `ERROR_TYPES`.
        retry_after (`int`, *optional*): Seconds after which to try again.
    """

    def __init__(self, status: int, error: str, error_type: str, *, retry_after: int | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.error_type = error_type
        self.retry_after = retry_after

    def response(self) -> JSONResponse:
        """It as Text Embeddings Inference sends it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": self.error, "error_type": self.error_type}, self.status, headers)


def invalid(error: str, status: int = 422) -> Problem:
    """A request that is not as it has to be."""
    return Problem(status, error, VALIDATION)


def unknown_task(name: str) -> Problem:
    """There is no task of that name."""
    return Problem(404, f"There is no task {name!r:.140}; GET /tasks lists them.", NOT_FOUND)


def of_encoding(error: TaskBankError) -> Problem:
    """A text could not be encoded; the bank's messages then speak of the request alone."""
    sentence = " ".join(str(error).split())
    if isinstance(error, TextTooLongError):
        return invalid(sentence, 413)
    return Problem(422, sentence, TOKENIZER)


def of_running(error: Exception, task: str | None) -> Problem:
    """A text could not be run. What happened is in the log, under a number that the client gets."""
    if isinstance(error, UnknownTaskError) and task is not None:
        return unknown_task(task)
    return Problem(424, f"Inference failed (number {logged(error, 'Inference failed')} in the log).", BACKEND)


def of_adding(error: BitFitError, name: str) -> Problem:
    """A task could not be added. The message may name files, so it is in the log."""
    sentence = next(words for kind, words in _OF_A_DELTA if isinstance(error, kind))
    number = logged(error, f"The task {name} could not be added", trace=False)
    return invalid(f"{sentence[:-1]} (number {number} in the log).")


def logged(error: BaseException, what: str, *, trace: bool = True) -> str:
    """Logs an error, and returns the number under which it is found there."""
    number = secrets.token_hex(4)
    logger.error("%s [%s]: %s", what, number, error, exc_info=error if trace else None)
    return number
