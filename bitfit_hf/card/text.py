"""How facts read in a card: numbers, sizes, and text of whatever origin."""

from __future__ import annotations

import re
from typing import Any


def titled(name: str | None, part: str | None) -> str | None:
    """A data set's name with that of its part."""
    return f"{name} ({part})" if name and part else name


def value_text(value: Any) -> str:
    """A setting as it was given, whole numbers without a fraction."""
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def number_text(value: float) -> str:
    """A metric to four places; smaller ones to three digits."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"


def size_text(num_bytes: int) -> str:
    """Bytes in the units of the Hub, of which a kilobyte has 1,000."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"


def plain_text(text: Any) -> str:
    """Text of whatever origin as one line of Markdown that says just that, also in a table."""
    line = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(str(text).split()))
    return line.replace("<", "&lt;")


def code_text(text: Any) -> str:
    """The same for between backticks, where nothing can be escaped."""
    return " ".join(str(text).split()).replace("`", "'").replace("<!--", "< !--")
