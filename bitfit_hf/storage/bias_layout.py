"""Where each tensor of a delta belongs, in `adapter_config.json`.

A file alone does not say what its tensors are in the paper's terms: that takes the architecture. So the configuration
keeps the answer that was found at injection, one line for each tensor, and a delta can be inspected, drawn and
compared without its base, by any later version:

```json
"bert.encoder.layer.0.attention.self.query.bias": {"layer": 0, "shape": [768], "term": "query"}
"transformer.h.0.attn.c_attn.bias": {"layer": 0, "shape": [2304], "terms": {"query": [[0, 768]]}}
```
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from ..errors import DeltaFormatError, DeltaMismatchError, collect
from ..terms import TERMS, Bias, resolve_terms
from ..terms.selection import ALL_LINEAR, fits
from .packed import unpack_place

_LARGEST = 10**9  # numbers from a file are not to overflow anything


def encode_layout(biases: Iterable[Bias]) -> dict[str, dict[str, Any]]:
    """Writes down what `biases` are.

    Args:
        biases (`Iterable[Bias]`): What is tuned.

    Returns:
        `dict[str, dict[str, Any]]`: For each tensor the `"shape"` of the bias; the `"layer"` and the `"stack"`, where
            there are several, that it lies in; its `"term"`, or, where only a part of the vector is tuned or it holds
            several terms, for each of the `"terms"` the index ranges; `"added": true` for a bias that the base does
            not have; the names of the biases that are `"tied"` to it.
    """
    groups: dict[str, list[Bias]] = {}
    for bias in biases:
        groups.setdefault(bias.name, []).append(bias)
    return {name: _encode(group) for name, group in groups.items()}


def _encode(group: list[Bias]) -> dict[str, Any]:
    first = group[0]
    place: dict[str, Any] = {"shape": list(first.shape)}
    if first.layer is not None:
        place["layer"] = first.layer
    if first.stack:
        place["stack"] = first.stack
    if not first.exists:
        place["added"] = True
    if first.aliases:
        place["tied"] = list(first.aliases)
    if len(group) == 1 and first.num_parameters == prod(first.shape):
        place["term"] = first.term
    else:
        place["terms"] = {bias.term: [list(span) for span in bias.spans] for bias in group}
    return place


def decode_layout(layout: Mapping[str, Any]) -> list[Bias]:
    """The inverse of [`encode_layout`], which also reads the strings of development versions.

    Raises:
        [`DeltaFormatError`]: A place is damaged.
    """
    return [bias for name, place in layout.items() for bias in _decode(name, place)]


def plain_layout(layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A `bias_layout` with the strings of development versions turned into today's plain values.

    Raises:
        [`DeltaFormatError`]: A place is damaged.
    """
    return {
        name: encode_layout(_decode(name, place))[name] if isinstance(place, str) else place
        for name, place in layout.items()
    }


def check_choice(
    biases: Iterable[Bias],
    *,
    bias_terms: str | Sequence[str],
    target_modules: str | Sequence[str] | None,
    exclude_modules: str | Sequence[str] | None,
    layers_to_transform: int | Sequence[int] | None,
    add_missing_biases: bool,
) -> None:
    """Compares what a file says was tuned with what the same file says was chosen.

    Args:
        biases (`Iterable[Bias]`): What was tuned, see [`decode_layout`].
        bias_terms, target_modules, exclude_modules, layers_to_transform, add_missing_biases:
            What was chosen, as [`BitFitConfig`] has it.

    Raises:
        [`DeltaMismatchError`]: More was tuned than was chosen; all that was is named at once.
    """
    terms = resolve_terms(bias_terms)
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    problems = []
    for bias in biases:
        if bias.term not in terms:
            problems.append(f"{bias.name} ({bias.term}) is not expected with bias_terms={bias_terms!r}")
        if layers is not None and bias.layer not in layers:
            problems.append(f"{bias.name} is not expected with layers_to_transform={layers_to_transform!r}")
        if target_modules is not None and not _any_fits(bias.modules, target_modules, unknown=True):
            problems.append(f"{bias.name} is not expected with target_modules={target_modules!r}")
        if exclude_modules is not None and _any_fits(bias.modules, exclude_modules, unknown=False):
            problems.append(f"{bias.name} is not expected with exclude_modules={exclude_modules!r}")
        if not bias.exists and not add_missing_biases:
            problems.append(f"{bias.name} is not in the base, which is not expected with add_missing_biases=False")
    if problems:
        raise DeltaMismatchError(
            f"BitFitConfig (adapter_config.json) contradicts itself: `bias_layout` says that more was tuned than "
            f"was chosen.{collect(problems)}\nSave or fetch the delta again. For a new adapter start from a fresh "
            "BitFitConfig."
        )


def _any_fits(paths: Sequence[str], names: str | Sequence[str], *, unknown: bool) -> bool:
    if names == ALL_LINEAR:
        return unknown  # a path does not say what kind of layer is there
    return any(fits(path, names) for path in paths)


def _decode(name: str, place: Any) -> list[Bias]:
    module, _, parameter = name.rpartition(".")
    try:
        found = unpack_place(place) if isinstance(place, str) else place
        shape, layer, stack = _shape(found["shape"]), found.get("layer"), found.get("stack", "")
        added, aliases = found.get("added", False), tuple(found.get("tied", ()))
        if "term" in found:
            terms = {found["term"]: [[0, prod(shape)]]}
        else:
            terms = {**found["terms"]}
        sound = (
            parameter
            and terms.keys() <= set(TERMS)
            and terms
            and (layer is None or _is_number(layer))
            and isinstance(stack, str)
            and isinstance(added, bool)
            and all(isinstance(alias, str) for alias in aliases)
        )
        if not sound:
            raise ValueError("not a bias of a term in a layer")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DeltaFormatError(
            f"adapter_config.json: `bias_layout` says {place!r:.80} of {name!r}, which is no place of a bias; "
            "fetch the delta again."
        ) from error
    biases = [
        Bias(module, parameter, term, layer, stack, shape, _spans(name, spans, prod(shape)), not added, aliases)
        for term, spans in terms.items()
    ]
    # JSON does not keep the order of the terms, and deltas are compared by it.
    biases.sort(key=lambda bias: bias.spans)
    ranges = sorted(span for bias in biases for span in bias.spans)
    if any(start < stop for (_, stop), (start, _) in pairwise(ranges)):
        raise DeltaFormatError(
            f"adapter_config.json: `bias_layout` gives the same values of {name!r} to two terms; fetch the delta "
            "again."
        )
    return biases


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or not 1 <= len(sizes) <= 2 or not all(map(_is_number, sizes)):
        raise ValueError(f"no shape of a bias: {sizes!r}")
    return tuple(sizes)


def _spans(name: str, spans: Any, size: int) -> tuple[tuple[int, int], ...]:
    sound = (
        isinstance(spans, list)
        and spans
        and all(isinstance(span, list) and len(span) == 2 and all(map(_is_number, span)) for span in spans)
        and all(0 <= start < stop <= size for start, stop in spans)
    )
    if not sound:
        raise DeltaFormatError(
            f"adapter_config.json: `bias_layout` names the ranges {spans!r:.80} of {name!r}, which has {size} values; "
            "fetch the delta again."
        )
    return tuple((start, stop) for start, stop in spans)
