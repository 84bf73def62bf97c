"""What is known about one family of architectures, and how paths are matched against it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from .fused import TermSpans

_Entry = TypeVar("_Entry")


@dataclass(frozen=True, eq=False)
class Family:
    """The bias terms of one family of architectures.

    Paths are matched component by component: `*` stands for any one component (in `blocks`, for a number), `a|b` for
    either. Those of layers and those outside layers may stand below any prefix, `bert.` or `model.decoder.` say.

    Args:
        model_types (`tuple[str, ...]`): The `config.model_type`s that share the table.
        blocks (`Mapping[str, Mapping[str, str]]`): Path of a transformer layer -> path inside the layer -> term.
        outside (`Mapping[str, str]`, *optional*): Path outside the layers -> term.
        lm_head (`tuple[str, ...]`, *optional*): Roots of the pre-trained language-modelling head.
        fused (`Mapping[str, TermSpans]`, *optional*): Path inside a layer of a fused projection -> its terms' ranges.
        free (`Mapping[str, str]`, *optional*):
            Free-standing bias vectors: path inside a layer, or path outside the layers -> term.
        stacks (`Mapping[str, str]`, *optional*): Path component -> name of the stack below it.
    """

    model_types: tuple[str, ...]
    blocks: Mapping[str, Mapping[str, str]]
    outside: Mapping[str, str] = field(default_factory=dict)
    lm_head: tuple[str, ...] = ()
    fused: Mapping[str, TermSpans] = field(default_factory=dict)
    free: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)

    def split(self, path: str) -> tuple[str, str, Mapping[str, str]] | None:
        """Splits a path into (path of the layer, path inside the layer, table); `None` outside the layers."""
        for block, table in self.blocks.items():
            match = _block(block).match(path)
            if match:
                return path[: match.end(1)], path[match.end(1) + 1 :], table
        return None

    def outside_term(self, path: str) -> str:
        """The term of a bias outside the layers, by the path of its module."""
        term = lookup(self.outside, path, anywhere=True)
        if term is None and any(_below(root).fullmatch(path) for root in self.lm_head):
            return "lm_head"
        return term or "other"

    def stack(self, path: str) -> str:
        """The name of the stack that holds `path`, `""` if the family has none there."""
        return next((self.stacks[part] for part in path.split(".") if part in self.stacks), "")


def lookup(table: Mapping[str, _Entry], path: str, *, anywhere: bool = False) -> _Entry | None:
    """The entry of `table` whose pattern matches `path`: all of it, or `anywhere` below any prefix."""
    if path in table:
        return table[path]
    return next((entry for pattern, entry in table.items() if _whole(pattern, anywhere).fullmatch(path)), None)


_ANY_PREFIX = r"(?:.*\.)?"


def _expression(pattern: str, star: str = r"[^.]+") -> str:
    parts = [star if part == "*" else "|".join(map(re.escape, part.split("|"))) for part in pattern.split(".")]
    return r"\.".join(f"(?:{part})" for part in parts)


@functools.cache
def _whole(pattern: str, anywhere: bool) -> re.Pattern[str]:
    return re.compile((_ANY_PREFIX if anywhere else "") + _expression(pattern))


@functools.cache
def _below(root: str) -> re.Pattern[str]:
    return re.compile(rf"{_ANY_PREFIX}{_expression(root)}(?:\..*)?")


@functools.cache
def _block(pattern: str) -> re.Pattern[str]:
    # The shortest prefix, so that a layer inside a layer (an MoE expert, say) is not taken for the layer.
    return re.compile(rf"((?:.*?\.)??{_expression(pattern, star='[0-9]+')})(?:\.|$)")
