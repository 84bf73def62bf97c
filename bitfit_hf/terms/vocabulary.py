"""The paper's names for the bias terms of a transformer.

The paper (Ben Zaken, Ravfogel and Goldberg, ACL 2022, section 3) writes one encoder layer as

    Q(x) = W_q x + b_q        K(x) = W_k x + b_k        V(x) = W_v x + b_v
    h2 = Dropout(W_m1 h1 + b_m1)
    h3 = g_LN1 * (h2 + x - mu) / sigma + b_LN1
    h4 = GELU(W_m2 h3 + b_m2)
    h5 = Dropout(W_m3 h4 + b_m3)
    out = g_LN2 * (h5 + h3 - mu) / sigma + b_LN2

and those eight symbols are what its ablations select by. A model has biases outside its layers too; they have words
instead of symbols.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ..errors import ConfigError, UnknownTermError

TERMS: tuple[str, ...] = (
    "query",
    "key",
    "value",
    "attention_output",
    "attention_layernorm",
    "intermediate",
    "output",
    "output_layernorm",
    "embedding_layernorm",
    "pooler",
    "lm_head",
    "other",
)

SYMBOLS: dict[str, str] = {term: term for term in TERMS} | {
    "query": "b_q",
    "key": "b_k",
    "value": "b_v",
    "attention_output": "b_m1",
    "attention_layernorm": "b_LN1",
    "intermediate": "b_m2",
    "output": "b_m3",
    "output_layernorm": "b_LN2",
}

ALIASES: dict[str, str] = {symbol: term for term, symbol in SYMBOLS.items() if symbol != term}

# "query+intermediate" is the half-size subset of the paper's Table 3, written "b_m2, b_q" there.
PRESETS: dict[str, tuple[str, ...]] = {"all": TERMS, "query+intermediate": ("query", "intermediate")}


def resolve_terms(bias_terms: str | Sequence[str]) -> tuple[str, ...]:
    """Spells out a choice of bias terms.

    Args:
        bias_terms (`str` or `Sequence[str]`):
            A term of `TERMS`, one of the paper's symbols (`"b_q"`, `"b_LN1"`, ...), a preset (`"all"`,
            `"query+intermediate"`), or a list of any of these.

    Returns:
        `tuple[str, ...]`: The chosen terms, each once, in the order of `TERMS`.

    Raises:
        UnknownTermError: If a name is none of these.
        ConfigError: If `bias_terms` is empty or not made of strings.

    Example:

    ```python
    >>> resolve_terms("query+intermediate")
    ('query', 'intermediate')
    >>> resolve_terms(["b_m2", "b_q"])
    ('query', 'intermediate')
    ```
    """
    chosen: set[str] = set()
    unknown: list[str] = []
    for name in named_terms(bias_terms):
        if name in PRESETS:
            chosen.update(PRESETS[name])
        elif name in ALIASES or name in TERMS:
            chosen.add(ALIASES.get(name, name))
        else:
            unknown.append(name)
    if unknown:
        raise UnknownTermError(_unknown_message(unknown))
    return tuple(term for term in TERMS if term in chosen)


def named_terms(bias_terms: str | Sequence[str]) -> list[str]:
    """Checks the type of `bias_terms` and returns its names as a list, as they were given."""
    if isinstance(bias_terms, str):
        return [bias_terms]
    if not isinstance(bias_terms, (list, tuple, set, frozenset)):
        raise ConfigError(
            f"bias_terms must be a string or a list of strings, but is {bias_terms!r} ({type(bias_terms).__name__}). "
            f"Pass 'all' or some of: {', '.join(TERMS)}."
        )
    wrong = [name for name in bias_terms if not isinstance(name, str)]
    if wrong:
        raise ConfigError(
            f"bias_terms must hold strings only, but {wrong[0]!r} is of type {type(wrong[0]).__name__}. "
            f"Pass some of: {', '.join(TERMS)}."
        )
    if not bias_terms:
        raise ConfigError(f"bias_terms is empty: nothing would be tuned. Pass 'all' or some of: {', '.join(TERMS)}.")
    return list(bias_terms)


def _unknown_message(unknown: list[str]) -> str:
    spellings = [*TERMS, *ALIASES, *PRESETS]
    by_lower_case = {name.lower(): name for name in spellings}
    hints = []
    for name in unknown:
        close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
        hints.append(f"{name!r}" + (f" (did you mean {by_lower_case[close[0]]!r}?)" if close else ""))
    return (
        f"bias_terms names {'an unknown term' if len(hints) == 1 else 'unknown terms'}: {', '.join(hints)}. "
        f"Valid are the terms {', '.join(TERMS)}; the paper's symbols {', '.join(ALIASES)}; "
        f"and the presets {', '.join(PRESETS)}."
    )
