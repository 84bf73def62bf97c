"""Where the tensors of a saved delta belong in a live model: the same for adapters and for deltas that are applied.

What was tuned is what the delta's `bias_layout` says, whatever this version of the library would choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..errors import DeltaMismatchError, collect
from ..terms import Bias, part_of
from ..terms.base_bias import base_bias
from ..terms.structure import shape_of, stock_root
from ..terms.survey import survey_model
from .head import BitFitHead, Labels, output_size
from .state import head_leaves


def find_places(
    model: nn.Module,
    layout: Iterable[Bias],
    head: Sequence[str],
    *,
    base: str | None,
    base_rows: Mapping[str, int] | None = None,
) -> list[Bias]:
    """Finds the biases of a saved delta in a model.

    Args:
        model (`nn.Module`): Stock or with adapters injected.
        layout (`Iterable[Bias]`): The delta's biases, see [`decode_layout`].
        head (`Sequence[str]`): What the delta trains whole.
        base (`str`, *optional*): Name of the delta's base, for messages.
        base_rows (`Mapping[str, int]`, *optional*): As for [`fingerprint`]: the entries that the delta's base has.

    Returns:
        `list[Bias]`: The same, in the model's order and with the names that tied ones have in it.

    Raises:
        [`DeltaMismatchError`]: Some have no place in the model; all of them are named.
    """
    survey = survey_model(model)
    layers = survey.modules
    live: dict[str, Bias] = {}
    for found in survey.found:
        live.setdefault(found.bias.name, found.bias)
    order = {name: number for number, name in enumerate(live)}
    places, problems = [], []
    for bias in layout:
        rows = (base_rows or {}).get(bias.name)
        problem = _problem(bias, layers.get(bias.module), live.get(bias.name), rows)
        if part_of(bias.name, head) is not None:
            problem = "belongs to the head, which is saved whole"
        if problem is not None:
            problems.append(f"{bias.name} {problem}")
        else:
            places.append(replace(bias, aliases=live[bias.name].aliases))
    if problems:
        name = type(stock_root(model)).__name__
        raise DeltaMismatchError(
            f"This delta does not fit {name}:{collect(dict.fromkeys(problems))}\n"
            f"It was trained on {base!r}; load it onto the same class of model."
        )
    return sorted(places, key=lambda bias: order[bias.name])


def _problem(bias: Bias, layer: nn.Module | None, live: Bias | None, rows: int | None) -> str | None:
    if layer is None:
        return f"has no place: there is no layer {bias.module}"
    if live is None:
        stored = layer._parameters.get(bias.parameter)
        if stored is None:
            return "does not exist in the model"
        return f"is no bias of the model, but another parameter of shape {list(shape_of(stored))}"
    exists = base_bias(layer, bias.parameter) is not None  # not one that a delta has brought
    if bias.exists and not exists:
        return "does not exist in the model"
    if exists and not bias.exists:
        return "was added for the delta, and the model has one of its own"
    shape = live.shape if rows is None else (rows,)
    if shape != bias.shape:
        return f"has shape {list(bias.shape)}, the model's {list(shape)}"
    return None


def find_labels(
    model: nn.Module,
    head: Sequence[str],
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    problem_type: str | None = None,
) -> tuple[Labels | None, str | None]:
    """An adapter's labels, and the leaf of its head that makes that many outputs.

    Args:
        model (`nn.Module`): The model.
        head (`Sequence[str]`): The head's parts.
        num_labels (`int`, *optional*), id2label (`Mapping[int, str]`, *optional*), problem_type (`str`, *optional*):
            What is known of the labels; the rest is the model's.

    Raises:
        [`DeltaMismatchError`]: The model's head cannot be given that many outputs.
    """
    root = stock_root(model)
    if not head or not isinstance(root, PreTrainedModel) or not getattr(root.config, "id2label", None):
        return None, None
    own = Labels.of(root)
    number = own.num_labels if num_labels is None else num_labels
    names = id2label or (
        own.id2label if number == own.num_labels else {index: f"LABEL_{index}" for index in range(number)}
    )
    if problem_type is None:
        # Another adapter's first batch may have settled the problem type that the model has at present.
        stock = next((found for _, leaf in head_leaves(root) if (found := leaf.labels_of(None)) is not None), own)
        problem_type = stock.problem_type
    labels = Labels(number, dict(names), problem_type)
    modules = dict(root.named_modules())
    sizes = {path: _sizes(modules[path]) for path in head if path in modules}
    logits = next((path for path in reversed(sizes) if own.num_labels in sizes[path]), None)
    if logits is None and labels.num_labels != own.num_labels:
        raise DeltaMismatchError(
            f"The adapter has {labels.num_labels} labels, but no layer of the head of {type(root).__name__} has "
            f"{own.num_labels} outputs that could be rebuilt. Load the base with `num_labels={labels.num_labels}`."
        )
    return labels, logits


def _sizes(leaf: nn.Module) -> set[int | None]:
    if isinstance(leaf, BitFitHead):
        return {output_size(leaf.original_module), *(output_size(module) for module in leaf.modules_to_save.values())}
    return {output_size(leaf)}
