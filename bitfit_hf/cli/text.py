"""Text from files and libraries made fit for a terminal."""

from __future__ import annotations

import re


def one_line(message: str) -> str:
    """Puts a message of several lines, with or without a list in it, on one."""
    joined = re.sub(r"[:.]\n\s*- ", ": ", message)  # where a list begins
    joined = re.sub(r"\n\s*- ", "; ", joined)
    return printable(" ".join(joined.split()))


def printable(text: object) -> str:
    """`text` without control characters: names come from files, and a terminal obeys what it is sent."""
    return "".join(char if char.isprintable() else "�" for char in str(text))
