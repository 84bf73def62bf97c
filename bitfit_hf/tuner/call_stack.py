"""Who is calling: what a library's own function was given, where it hands on less than is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

# The frames between this library and such a function: hooks, constructors, decorators.
_MAX_DEPTH = 11


def callers() -> Iterator[FrameType]:
    """The frames of the caller and of those that called it, the innermost first, as many as can matter."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_DEPTH):
        if frame is None:
            return
        yield frame
        frame = frame.f_back
