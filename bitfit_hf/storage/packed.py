"""What development versions packed into strings of `adapter_config.json`, as the plain values of today.

Nothing else of their files has changed. Each function raises `ValueError` where a string is damaged.
"""

from __future__ import annotations

import base64
import re
import struct
from typing import Any

# Of at most nine digits each: numbers from a file are not to overflow anything.
_PIECE = re.compile(
    r"(?P<term>\w+) (?P<layer>\d{1,9}|-) (?P<stack>[\w.]+|-) "
    r"(?P<shape>\d{1,9}(?:x\d{1,9})?)(?P<added>\+?)(?: (?P<spans>[\d:,]+))?",
    re.ASCII,
)


def unpack_place(text: str) -> dict[str, Any]:
    """A place in the `bias_layout`: `"query 0 - 768"`, with ranges and `;` between the terms of a fused vector."""
    shared: dict[str, Any] | None = None
    terms: dict[str, list[list[int]] | None] = {}
    for piece in text.split("; "):
        match = _PIECE.fullmatch(piece)
        if match is None or match["term"] in terms:
            raise ValueError(f"{piece!r:.80} is no place of a bias")
        place: dict[str, Any] = {"shape": [int(size) for size in match["shape"].split("x")]}
        if match["layer"] != "-":
            place["layer"] = int(match["layer"])
        if match["stack"] != "-":
            place["stack"] = match["stack"]
        if match["added"]:
            place["added"] = True
        if shared not in (None, place):
            raise ValueError("its terms lie in different places")
        shared = place
        terms[match["term"]] = None if match["spans"] is None else _spans(match["spans"])
    assert shared is not None  # `split` gives at least one piece
    if len(terms) == 1 and None in terms.values():
        return {"term": next(iter(terms)), **shared}
    if None in terms.values():
        raise ValueError("one of its terms has no ranges")
    return {"terms": terms, **shared}


def _spans(text: str) -> list[list[int]]:
    spans = []
    for part in text.split(","):
        start, stop = part.split(":")
        spans.append([int(start), int(stop)])
    return spans


def unpack_print(text: str) -> dict[str, Any]:
    """The fingerprint of a tensor: `"float32 8x8 <digests> <sample in base 64>"`."""
    dtype, shape, digests, packed = text.split(" ")
    sizes = [] if shape == "scalar" else shape.split("x")
    if not all(size.isascii() and size.isdigit() for size in sizes):
        raise ValueError(f"no shape: {shape!r}")
    raw = b"" if packed == "-" else base64.b64decode(packed, validate=True)
    if len(raw) % 4:
        raise ValueError("its sample is cut")
    found: dict[str, Any] = {
        "dtype": dtype,
        "shape": [int(size) for size in sizes],
        "sample": list(struct.unpack(f"<{len(raw) // 4}f", raw)),
    }
    if digests != "-":
        found["sha256"] = dict(zip(("float32", "bfloat16", "float16"), digests.split(","), strict=True))
    return found
