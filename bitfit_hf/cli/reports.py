"""What `bitfit inspect` and `bitfit diff` find out, as plain values that are ready for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..analysis import bias_change, pieces, term_counts
from ..card.metrics import known_metrics
from ..delta.value import BiasDelta
from ..errors import BaseModelMismatchError, NoBiasesError, UnknownHeadError
from ..storage.files import CARD_FILE
from ..terms import SYMBOLS, TERMS, Bias, find_biases, head_modules, part_tensors, select_biases, unknown_vectors
from ..terms.base_size import num_base_parameters

# Where a bias is: stack, term, layer.
Place = tuple[str, str, int | None]


def inspect_delta(delta: BiasDelta, folder: Path, name: str, *, largest: int) -> dict[str, Any]:
    """Everything that a delta's own files say.

    Args:
        delta ([`BiasDelta`]): The delta.
        folder (`Path`): Where its files are.
        name (`str`): What the user calls it.
        largest (`int`): How many of the largest changes are listed.
    """
    config = delta.config
    counts = term_counts(delta)
    of_base = config.base_num_parameters
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return {
        "kind": "delta",
        "name": name,
        "base_model": config.base_model_name_or_path,
        "revision": config.revision,
        "task_type": config.task_type,
        "bias_terms": config.bias_terms,
        "terms": _terms(bias for group in delta.biases.values() for bias in group),
        "parameters": {
            "biases": counts.biases,
            "head": counts.head,
            "tokens": counts.tokens,
            "total": counts.total,
            "base": of_base,
            "biases_percent_of_base": 100 * counts.biases / of_base if of_base else None,
        },
        "added_tokens": config.added_tokens or 0,
        "added_biases": sum(not group[0].exists for group in delta.biases.values()),
        "head": {name: list(tensor.shape) for name, tensor in delta.head.items()},
        "num_labels": config.num_labels,
        "labels": None if config.id2label is None else [config.id2label[i] for i in sorted(config.id2label)],
        "problem_type": config.problem_type,
        "metrics": known_metrics(config, folder / CARD_FILE),
        "largest_changes": [vars(row) for row in bias_change(delta).largest(largest)],
        "files": sizes,
        "bytes": sum(sizes.values()),
        "bitfit_version": config.bitfit_version,
    }


def inspect_base(model: nn.Module, name: str) -> dict[str, Any]:
    """What there is to tune in a model.

    Args:
        model (`torch.nn.Module`): The model; without weights will do.
        name (`str`): What the user calls it.
    """
    head: list[str] | None
    try:
        head = head_modules(model)
    except UnknownHeadError:
        head = None
    biases = find_biases(model)
    of_base = num_base_parameters(model, head or [])
    of_head = sum(t.numel() for t in part_tensors(model, head or []).values() if isinstance(t, nn.Parameter))
    of_biases = sum(bias.num_parameters for bias in biases)
    return {
        "kind": "base",
        "name": name,
        "model_class": type(model).__name__,
        "terms": _terms(biases),
        "parameters": {
            "biases": of_biases,
            "head": None if head is None else of_head,
            "base": of_base,
            "biases_percent_of_base": 100 * of_biases / of_base if of_base else None,
        },
        "missing_biases": _missing(model),
        "head": head,
        "unknown_vectors": unknown_vectors(model),
    }


def _missing(model: nn.Module) -> int | None:
    """How many layers `add_missing_biases=True` would give a bias; `None` where the model cannot be tuned as it is."""
    try:
        return sum(not bias.exists for bias in select_biases(model, add_missing_biases=True))
    except NoBiasesError:
        return 0
    except UnknownHeadError:
        return None


def compare(a: BiasDelta, b: BiasDelta) -> dict[str, Any]:
    """How two deltas differ, by term and layer, in the units of [`bias_change`].

    Args:
        a ([`BiasDelta`]), b ([`BiasDelta`]): The deltas, of whatever bases.
    """
    of_a, of_b = _slices(a), _slices(b)
    shared = [key for key in of_a if key in of_b and of_a[key][1].shape == of_b[key][1].shape]
    pairs: dict[Place, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for key in shared:
        bias, values = of_a[key]
        pairs.setdefault(_place(bias), []).append((values, of_b[key][1]))
    alone = [
        {"delta": label, "tensor": bias.name, "term": bias.term, "layer": bias.layer, "size": values.numel()}
        for label, mine in (("a", of_a), ("b", of_b))
        for key, (bias, values) in mine.items()
        if key not in shared
    ]
    rows = [
        {"stack": stack, "term": term, "symbol": SYMBOLS[term], "layer": layer, **_distance(pairs[stack, term, layer])}
        for stack, term, layer in sorted(pairs, key=_order)
    ]
    return {
        "a": _summary(a),
        "b": _summary(b),
        "same_base": _same_base(a, b),
        "rows": rows,
        "total": _distance([pair for group in pairs.values() for pair in group]),
        "only_one": alone,
        "head": _compare_heads(a.head, b.head),
    }


def _terms(biases: Iterable[Bias]) -> list[dict[str, Any]]:
    tensors: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for bias in biases:
        tensors[bias.term] += 1
        parameters[bias.term] += bias.num_parameters
    return [
        {"term": term, "symbol": SYMBOLS[term], "tensors": tensors[term], "parameters": parameters[term]}
        for term in TERMS
        if tensors[term]
    ]


def _slices(delta: BiasDelta) -> dict[tuple[str, str], tuple[Bias, torch.Tensor]]:
    """The part of each tensor that belongs to each term, by the tensor's name and the term."""
    return {
        (name, bias.term): (bias, values)
        for name, biases in delta.biases.items()
        for bias, values in zip(biases, pieces(delta[name], biases))
    }


def _place(bias: Bias) -> Place:
    return bias.stack, bias.term, bias.layer


def _order(place: Place) -> tuple[str, int, int]:
    stack, term, layer = place
    return stack, TERMS.index(term), -1 if layer is None else layer


def _distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Mean absolute difference and cosine of what `pairs` hold together; `None` where that has no meaning."""
    left, right = (torch.cat([torch.empty(0), *side]).double() for side in zip(*pairs)) if pairs else (None, None)
    if left is None or right is None:
        return {"distance": None, "cosine": None, "size": 0}
    lengths = (left.norm() * right.norm()).item()
    return {
        "distance": (left - right).abs().mean().item(),
        "cosine": torch.dot(left, right).item() / lengths if lengths else None,
        "size": left.numel(),
    }


def _summary(delta: BiasDelta) -> dict[str, Any]:
    return {
        "base_model": delta.config.base_model_name_or_path,
        "revision": delta.config.revision,
        "biases": delta.num_parameters(),
        "head": delta.num_parameters(head=True) - delta.num_parameters(),
    }


def _same_base(a: BiasDelta, b: BiasDelta) -> bool:
    try:
        a.check_same_base(b)  # what their arithmetic goes by
    except BaseModelMismatchError:
        return False
    return True


def _compare_heads(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    comparable = a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    pairs = [(a[name].flatten(), b[name].flatten()) for name in a] if comparable else []
    return {
        "comparable": bool(pairs),
        "distance": _distance(pairs)["distance"],
        "a": {name: list(tensor.shape) for name, tensor in a.items()},
        "b": {name: list(tensor.shape) for name, tensor in b.items()},
    }
