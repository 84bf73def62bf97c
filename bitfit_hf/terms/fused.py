"""How fused projections are laid out: which index ranges of their bias belong to which term.

Each function takes the length of the fused bias and the model's config, and returns the ranges of each term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Spans = tuple[tuple[int, int], ...]
TermSpans = Callable[[int, Any], dict[str, Spans]]


def thirds(size: int, config: Any = None) -> dict[str, Spans]:
    """`[query | key | value]`, equally long."""
    third = size // 3
    return {"query": ((0, third),), "key": ((third, 2 * third),), "value": ((2 * third, size),)}


def halves(size: int, config: Any) -> dict[str, Spans]:
    """`[key | value]`: the fused projection of GPT-2's cross-attention."""
    return {"key": ((0, size // 2),), "value": ((size // 2, size),)}


def per_head(size: int, config: Any) -> dict[str, Spans]:
    """`[head][query | key | value][head_dim]`."""
    return _grouped(size, config.num_attention_heads, 1)


def _grouped(size: int, groups: int, queries: int) -> dict[str, Spans]:
    """`[group][queries..., key, value][head_dim]`: each group of `queries` heads shares one key and one value."""
    width = size // (groups * (queries + 2))
    starts = [group * (queries + 2) * width for group in range(groups)]
    parts = {"query": (0, queries), "key": (queries, queries + 1), "value": (queries + 1, queries + 2)}
    return {
        term: tuple((start + first * width, start + last * width) for start in starts)
        for term, (first, last) in parts.items()
    }


def falcon(size: int, config: Any) -> dict[str, Spans]:
    """Per group in the new decoder architecture, else one group of all heads (multi-query), else per head."""
    if config.new_decoder_architecture:
        return _grouped(size, config.num_kv_heads, config.num_attention_heads // config.num_kv_heads)
    return _grouped(size, 1, config.num_attention_heads) if config.multi_query else per_head(size, config)


def phi3(size: int, config: Any) -> dict[str, Spans]:
    """`[query heads | key heads | value heads]`, with fewer key and value heads than query heads."""
    groups = config.num_attention_heads // config.num_key_value_heads
    width = size // (groups + 2)
    return {
        "query": ((0, groups * width),),
        "key": ((groups * width, (groups + 1) * width),),
        "value": (((groups + 1) * width, size),),
    }


def gpt_bigcode(size: int, config: Any) -> dict[str, Spans]:
    """`[query heads | key | value]` with one key and one value (multi-query), else per head."""
    return _grouped(size, 1, config.num_attention_heads) if config.multi_query else per_head(size, config)


def codegen(size: int, config: Any) -> dict[str, Spans]:
    """`[query | value | key]` in each of four blocks, as the model was sharded when it was trained."""
    width = size // 12
    return {
        term: tuple(((3 * shard + part) * width, (3 * shard + part + 1) * width) for shard in range(4))
        for part, term in enumerate(("query", "value", "key"))
    }


def per_head_key(size: int, config: Any) -> dict[str, Spans]:
    """The keys of a per-head layout whose queries and values have biases of their own (DeBERTa)."""
    return {"key": per_head(size, config)["key"]}
