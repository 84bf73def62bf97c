"""Entities in tagged sentences and how many of them are found: F1 as in CoNLL-2003 (Tjong Kim Sang & De Meulder)."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[str, int, int]  # kind, first word, the word after the last


def has_entities(labels: Sequence[str]) -> bool:
    """Whether labels mark the begin and the inside of entities: `O` and `B-…` or `I-…`."""
    return "O" in labels and len(labels) > 1 and all(name == "O" or name[:2] in ("B-", "I-") for name in labels)


def entities(tags: Sequence[str]) -> set[Span]:
    """The entities of a sentence. An `I-` without its own kind before it begins one, as in CoNLL's script."""
    found: set[Span] = set()
    begin, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((kind, begin, index))
            kind = ""
        if mark in ("B", "I") and not kind:
            begin, kind = index, name
    return found


def entity_scores(right: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all entities; one counts as found if its kind and all its words are right.

    Args:
        right (`Sequence[Sequence[str]]`), given (`Sequence[Sequence[str]]`): A tag for each word of each sentence.
    """
    pairs = [(entities(expected), entities(said)) for expected, said in zip(right, given)]
    common = sum(len(expected & said) for expected, said in pairs)
    said, expected = sum(len(b) for _, b in pairs), sum(len(a) for a, _ in pairs)
    precision = common / said if said else 0.0
    recall = common / expected if expected else 0.0
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    return {"entity_f1": f1, "entity_precision": precision, "entity_recall": recall}
