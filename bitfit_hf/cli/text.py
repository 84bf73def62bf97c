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


def width() -> int:
    """Columns of the terminal, or 100 where there is none."""
    import shutil  # with what it imports it takes longer than all the rest of a usage error

    return max(shutil.get_terminal_size((100, 24)).columns, 40)


def wrapped(text: str, indent: int = 0) -> str:
    """A paragraph that is wrapped between words. A path or a name is never broken, since somebody may copy it.

    Args:
        text (`str`): On one line.
        indent (`int`, *optional*, defaults to 0): Of all lines but the first.
    """
    import textwrap

    return textwrap.fill(
        text, width() - 1, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
