"""Taking a delta out of models: of one with adapters, or of a checkpoint and its base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backends.sharded import gathered, put_back
from ..config import BitFitConfig
from ..errors import AdapterNameError, DeltaMismatchError, collect
from ..storage.base_commit import base_commit
from ..storage.bias_layout import encode_layout
from ..storage.fingerprint import fingerprint
from ..storage.keys import bias_of_key, is_added
from ..terms import class_head, find_biases, head_modules, part_of, part_tensors, untrained_pooler
from ..terms.base_bias import add_deltas, base_bias
from ..terms.base_size import num_base_parameters
from ..terms.structure import stock_root, walk
from ..terms.survey import span_index
from ..terms.tasks import class_record, peft_task_type
from ..terms.token_tensors import check_rows, vocabulary_size
from ..tuner.added_tokens import AddedTokens, fit_added_tokens
from ..tuner.head import Labels
from ..tuner.state import delta_parameters, head_tensors, is_bitfit, read_labels
from ..tuner.token_rows import added_shapes, parameter_of
from .parts import DeltaParts, grouped


def extract_adapter(tuned: nn.Module, adapter_name: str) -> DeltaParts:
    """The work of [`BiasDelta.from_model`]."""
    configs = getattr(stock_root(tuned), "peft_config", None) or getattr(tuned, "peft_config", {})
    config = configs.get(adapter_name) if isinstance(configs, Mapping) else None
    if not isinstance(config, BitFitConfig) or not is_bitfit(tuned):
        known = [name for name, other in configs.items() if isinstance(other, BitFitConfig)]
        raise AdapterNameError(
            f"{type(tuned).__name__} has no BitFit adapter {adapter_name!r} (it has {known}). For two plain "
            "checkpoints use `BiasDelta.from_models(base, tuned)`."
        )
    check_rows(tuned)
    put_back(tuned)
    read_labels(tuned, adapter_name, config)
    deltas = {}
    for key, parameter in delta_parameters(tuned, adapter_name).items():
        bias = bias_of_key(key)
        assert bias is not None
        deltas[bias] = _copy(gathered(parameter))
    head = {name: _copy(gathered(tensor)) for name, tensor in head_tensors(tuned, adapter_name).items()}
    added = {name: head.pop(name) for name in list(head) if config.added_tokens and is_added(name)}
    return DeltaParts(deltas, copy.deepcopy(config), head, added)


def extract_difference(base: nn.Module, tuned: nn.Module) -> DeltaParts:
    """The work of [`BiasDelta.from_models`]."""
    base, tuned = stock_root(base), stock_root(tuned)
    layers, tuned_layers = dict(walk(base)), dict(walk(tuned))
    before: dict[str, torch.Tensor] = dict(base.named_parameters(remove_duplicate=False))
    after: dict[str, torch.Tensor] = dict(tuned.named_parameters(remove_duplicate=False))
    pooler = _trained_from_scratch(base, before, after)
    head_names = head_modules(tuned, modules_to_save=pooler, with_untrained_pooler=False)
    biases = [
        bias
        for bias in find_biases(tuned, with_untrained_pooler=False)
        if bias.exists and part_of(bias.name, head_names) is None
    ]
    tuned_ones = {id(after[bias.name]) for bias in biases}
    names = {name for name, tensor in after.items() if id(tensor) in tuned_ones}  # tied ones have several
    added: dict[str, torch.Tensor] = {}
    tokens = _tokens_between(base, tuned)
    if tokens is not None:
        biases = tokens.in_base(biases)
        added = {
            name: _copy(parameter_of(tuned_layers, name)[tokens.start : tokens.stop]).to(torch.float32)
            for name in added_shapes(tuned_layers, tokens)
        }
        after |= {name: after[name][:rows] for name, rows in tokens.base_rows.items() if name in after}
    _check_only_biases_differ(before, after, names, head_names)

    own = {bias.name for bias in find_biases(base, with_untrained_pooler=False)}
    biases = [b if b.name in own else replace(b, exists=False) for b in biases]
    deltas, errors = {}, [0.0]
    for name, group in grouped(biases).items():
        b_f = after[name].detach().cpu()
        b_0 = base_bias(layers[group[0].module], group[0].parameter) if name in before else None
        b_0 = torch.zeros_like(b_f) if b_0 is None else b_0.detach().cpu()
        delta = (b_f.double() - b_0.double()).to(torch.float32)
        back = add_deltas(b_0, [(delta, None)], dtype=b_f.dtype)
        errors.append((back.double() - b_f.double()).abs().max().item())
        index = span_index(group)
        deltas[name] = delta.clone() if index is None else delta.flatten()[index]
    prints = fingerprint(base, biases)
    labels = Labels.of(tuned) if head_names and isinstance(tuned, PreTrainedModel) else None
    known = tuned if isinstance(tuned, PreTrainedModel) else None
    config = BitFitConfig(
        task_type=None if known is None else peft_task_type(known),
        auto_mapping=None if known is None else class_record(known),
        num_labels=labels.num_labels if labels else None,
        id2label=labels.id2label if labels else None,
        problem_type=labels.problem_type if labels else None,
        modules_to_save=head_names or None,
        add_missing_biases=any(not bias.exists for bias in biases),
        base_model_name_or_path=getattr(base, "name_or_path", None) or None,
        revision=base_commit(getattr(base, "name_or_path", None), prints),
        base_fingerprint=prints,
        base_num_parameters=num_base_parameters(base, [*class_head(base), *pooler]) or None,
        bias_layout=encode_layout(biases),
        added_tokens=None if tokens is None else tokens.count,
        base_vocab_size=None if tokens is None else tokens.start,
    )
    head = {
        name: _copy(tensor).to(torch.float32) if tensor.is_floating_point() else _copy(tensor)
        for name, tensor in part_tensors(tuned, head_names).items()
    }
    return DeltaParts(deltas, config, head, added, error=max(errors))


def _trained_from_scratch(
    base: nn.Module, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> list[str]:
    """The modules of an untrained pooler of the base whose weights were trained with the head.

    Where its weights are the base's, at most its biases were trained, and these are deltas like any other.
    """
    pooler = untrained_pooler(base)
    of_pooler = [name for name in before if name in after and part_of(name, pooler)]
    biases = {bias.name for bias in find_biases(base, with_untrained_pooler=False)}
    same = all(
        before[name].shape == after[name].shape and torch.equal(before[name].to(after[name].dtype), after[name])
        for name in of_pooler
        if name not in biases
    )
    return [] if same else pooler


def _check_only_biases_differ(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], biases: set[str], head: list[str]
) -> None:
    problems = []
    for name, tensor in after.items():
        if name in biases or part_of(name, head) is not None:
            continue
        if name not in before:
            problems.append(f"{name} is not in the base")
        elif before[name].shape != tensor.shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, the base's {list(before[name].shape)}")
        elif not torch.equal(before[name].to(tensor.dtype), tensor):
            gap = (before[name].float() - tensor.float()).abs().max().item()
            problems.append(f"{name} differs by {gap:.1e}")
    problems += [
        f"{name} has shape {list(after[name].shape)}, the base's {list(before[name].shape)}"
        for name in sorted(biases)
        if name in before and before[name].shape != after[name].shape
    ]
    problems += [f"{n} is not in the tuned model" for n in before if n not in after and part_of(n, head) is None]
    if problems:
        raise DeltaMismatchError(
            f"These checkpoints differ in more than biases and head, so no bias delta leads from one to the other:"
            f"{collect(problems)}\nIs it the right base, and was nothing else trained?"
        )


def _tokens_between(base: nn.Module, tuned: nn.Module) -> AddedTokens | None:
    """The tokens that a tuned checkpoint has beyond its base."""
    sizes = vocabulary_size(base), vocabulary_size(tuned)
    if sizes[0] is None or sizes[1] is None or sizes[0] >= sizes[1]:
        return None
    return fit_added_tokens(tuned, sizes[0], sizes[1] - sizes[0])


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # DTensors of a sharded model know how to put themselves together.
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().clone()
