"""Where each tensor of a delta belongs, as text for `adapter_config.json`.

A file alone does not say what its tensors are in the paper's terms: that takes the architecture. So the configuration
keeps the answer that was found at injection, one line for each tensor, and a delta can be inspected, drawn and
compared without its base, by any later version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

from ..errors import DeltaFormatError
from ..terms import TERMS, Bias

# Of at most nine digits each: numbers from a file are not to overflow anything.
_PIECE = re.compile(
    r"(?P<term>\w+) (?P<layer>\d{1,9}|-) (?P<stack>[\w.]+|-) "
    r"(?P<shape>\d{1,9}(?:x\d{1,9})?\+?)(?: (?P<spans>[\d:,]+))?",
    re.ASCII,
)


def encode_layout(biases: Iterable[Bias]) -> dict[str, str]:
    """Writes down what `biases` are.

    Args:
        biases (`Iterable[Bias]`): What is tuned.

    Returns:
        `dict[str, str]`: For each tensor `"term layer stack shape"`, with the index ranges of its slices behind it
        where it is fused (`;` between the terms), and a `+` behind the shape of a bias that the base does not have.
    """
    pieces: dict[str, list[str]] = {}
    for bias in biases:
        shape = "x".join(map(str, bias.shape)) + ("" if bias.exists else "+")
        text = f"{bias.term} {'-' if bias.layer is None else bias.layer} {bias.stack or '-'} {shape}"
        if bias.num_parameters != _size(bias.shape):
            text += " " + ",".join(f"{start}:{stop}" for start, stop in bias.spans)
        pieces.setdefault(bias.name, []).append(text)
    return {name: "; ".join(texts) for name, texts in pieces.items()}


def decode_layout(layout: Mapping[str, str]) -> list[Bias]:
    """The inverse of [`encode_layout`].

    Raises:
        [`DeltaFormatError`]: A line is damaged.
    """
    biases = []
    for name, text in layout.items():
        module, _, parameter = name.rpartition(".")
        group = []
        for piece in text.split("; "):
            match = _PIECE.fullmatch(piece)
            if match is None or match["term"] not in TERMS or not parameter:
                raise DeltaFormatError(
                    f"adapter_config.json: `bias_layout` says {piece!r:.80} of {name!r}, which is no place of a bias; "
                    "fetch the delta again."
                )
            shape = tuple(int(size) for size in match["shape"].rstrip("+").split("x"))
            spans = ((0, _size(shape)),) if match["spans"] is None else _spans(match["spans"], _size(shape), name)
            group.append(
                Bias(
                    module=module,
                    parameter=parameter,
                    term=match["term"],
                    layer=None if match["layer"] == "-" else int(match["layer"]),
                    stack="" if match["stack"] == "-" else match["stack"],
                    shape=shape,
                    spans=spans,
                    exists=not match["shape"].endswith("+"),
                )
            )
        _check_group(group)
        biases += group
    return biases


def _check_group(group: list[Bias]) -> None:
    """Terms of one vector share its shape, and no value belongs to two of them."""
    spans = sorted(span for bias in group for span in bias.spans)
    overlap = any(stop > start for (_, stop), (start, _) in pairwise(spans))
    if overlap or len({(bias.shape, bias.exists) for bias in group}) > 1:
        raise DeltaFormatError(
            f"adapter_config.json: `bias_layout` gives several terms of {group[0].name!r} the same values, or "
            "different shapes; fetch the delta again."
        )


def _spans(text: str, size: int, name: str) -> tuple[tuple[int, int], ...]:
    try:
        spans = tuple((int(start), int(stop)) for start, stop in (part.split(":") for part in text.split(",")))
    except ValueError:
        spans = ()
    if not spans or any(not 0 <= start < stop <= size for start, stop in spans):
        raise DeltaFormatError(
            f"adapter_config.json: `bias_layout` names the ranges {text!r:.80} of {name!r}, which has {size} values; "
            "fetch the delta again."
        )
    return spans


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
