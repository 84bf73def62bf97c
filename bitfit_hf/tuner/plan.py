"""What an injection is going to do, worked out and checked before anything is touched."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backends.quantized import is_quantized
from ..config import BitFitConfig
from ..errors import (
    AddedTokensError,
    ConfigError,
    NoMatchError,
)
from ..storage.base_commit import base_commit
from ..storage.bias_layout import decode_layout, encode_layout
from ..storage.fingerprint import check_base, fingerprint
from ..storage.keys import delta_key, from_file
from ..terms import (
    PEFT_NAMES,
    Bias,
    SavedNames,
    class_head,
    find_biases,
    head_modules,
    part_tensors,
    pooler_modules,
    select_biases,
    untrained_pooler,
)
from ..terms.base_size import num_base_parameters
from ..terms.selection import fits
from ..terms.structure import stock_module, stock_root, walk
from ..terms.tasks import class_record, peft_task_type
from .added_tokens import AddedTokens, find_added_tokens, placed_tokens
from .head import Labels, float32_copy
from .lifecycle import awaits_tensors
from .places import find_labels, find_places
from .plan_checks import check_free, check_head, check_name, check_not_applied, check_not_split, check_read_once
from .state import check_fit, is_bitfit
from .token_rows import TokenRows, added_shapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The outcome of planning an injection.

    Args:
        biases (`list[Bias]`): What is tuned.
        parameters (`dict[str, tuple[str, ...]]`): For each module all biases that any adapter could tune there.
        head (`list[str]`): Parts of the head, see [`head_modules`].
        middle (`frozenset[str]`): Those of them that are no head by the model's class, so that layers may follow.
        labels ([`Labels`], *optional*): The adapter's labels, where there is a head.
        logits (`str`, *optional*): The leaf whose size is the number of labels.
        labels_at (`str`, *optional*): The leaf of the head that keeps the label names in step with the active adapter.
        tokens ([`AddedTokens`], *optional*): The tokens that the checkpoint does not have.
        values (`dict[str, Any]`): What the configuration is completed with.
    """

    biases: list[Bias]
    parameters: dict[str, tuple[str, ...]]
    head: list[str]
    middle: frozenset[str]
    labels: Labels | None
    logits: str | None
    labels_at: str | None
    tokens: AddedTokens | None
    values: dict[str, Any]

    def by_module(self) -> dict[str, list[Bias]]:
        """The biases of each module."""
        grouped: dict[str, list[Bias]] = defaultdict(list)
        for bias in self.biases:
            grouped[bias.module].append(bias)
        return grouped

    def check_fit(self, model: nn.Module, tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
        """Compares the tensors of a file with those that the adapter is going to have.

        Raises:
            [`DeltaMismatchError`]: They differ; all differences are named at once.
        """
        expected: dict[str, torch.Tensor] = {}
        with torch.device("meta"):
            for module, biases in self.by_module().items():
                for parameter in dict.fromkeys(bias.parameter for bias in biases):
                    chosen = [bias for bias in biases if bias.parameter == parameter]
                    size = sum(bias.num_parameters for bias in chosen)
                    whole = size == torch.Size(chosen[0].shape).numel()
                    expected[delta_key(module, parameter)] = torch.empty(chosen[0].shape if whole else (size,))
        modules = dict(walk(stock_root(model)))
        if self.tokens is not None:
            with torch.device("meta"):
                expected |= {name: torch.empty(shape) for name, shape in added_shapes(modules, self.tokens).items()}
        # What is quantized in the base is trained as a plain layer.
        packed = [path for path in self.head if path in modules and is_quantized(modules[path])]
        expected |= part_tensors(model, [part for part in self.head if part not in packed])
        for path in packed:
            with torch.device("meta"):
                layer: Any = modules[path]
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            expected |= {f"{path}.{name}": tensor for name, tensor in plain.state_dict().items()}
        if self.logits is not None and self.labels is not None:
            copy = float32_copy(modules[self.logits], self.labels.num_labels)
            expected |= {f"{self.logits}.{name}": tensor for name, tensor in copy.state_dict().items()}
        check_fit(expected, {from_file(key): value for key, value in tensors.items()}, where=where)

    def describe(self, config: BitFitConfig) -> None:
        """Writes into the configuration what was found out."""
        for name, value in self.values.items():
            setattr(config, name, value)


def make_plan(
    model: nn.Module, config: BitFitConfig, adapter_name: str, *, only: Mapping[str, torch.Tensor] | None = None
) -> Plan:
    """Works out what injecting `config` into `model` does. Changes neither.

    Args:
        model (`nn.Module`): The base model, perhaps with adapters injected already.
        config ([`BitFitConfig`]): What to tune.
        adapter_name (`str`): Name of the new adapter.
        only (`Mapping[str, torch.Tensor]`, *optional*): A state dict whose keys restrict the biases.

    Returns:
        [`Plan`].

    Raises:
        [`BitFitError`]: Of the kind that says what is wrong, see [`select_biases`] and [`check_base`].
    """
    check_name(model, adapter_name)
    check_head(model, config)
    pooler = pooler_modules(model)
    check_not_applied(model)
    tokens = _tokens(model, config)
    base_rows = {} if tokens is None else tokens.base_rows
    name = config.base_model_name_or_path
    if awaits_tensors(config) or config.base_fingerprint is not None:  # a new adapter takes the base's below
        check_base(model, config.base_fingerprint, delta_base=name, base_rows=base_rows)
    if awaits_tensors(config) and config.bias_layout:
        # What the file says was tuned and trained, whatever this version would choose.
        head = []
        if config.modules_to_save:
            head = head_modules(model, config.task_type, config.modules_to_save, with_untrained_pooler=False)
        biases = find_places(model, decode_layout(config.bias_layout), head, base=name, base_rows=base_rows)
    else:
        head, biases = _selection(model, config, config.modules_to_save)
        unknown = [] if awaits_tensors(config) else _not_in_checkpoint(model, biases, resized=base_rows)
        frozen = [path for path in pooler if path in unknown]
        if frozen:
            raise ConfigError(
                f"{frozen[0]} is not in the checkpoint of {type(model).__name__} and starts at random, so it cannot "
                "be left frozen: every process that loads the base would make another one. Leave it to the head, "
                "without `train_untrained_pooler=False` and `exclude_modules`."
            )
        if unknown and head:
            logger.warning(
                "%s is not in the checkpoint of %s and starts at random, so it is trained and saved whole, with the "
                "head.",
                ", ".join(unknown),
                type(model).__name__,
            )
            head, biases = _selection(model, config, [*(config.modules_to_save or []), *unknown])
        elif unknown:
            biases = [bias for bias in biases if bias.module not in unknown]
    if only is not None:
        biases = _restrict(biases, only)
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = [bias.module for bias in biases]
    resized = [] if tokens is None else [path for paths in tokens.tensors.weights for path in paths]
    check_free(modules, [*targets, *resized], head)
    check_read_once(model, targets, head)
    check_not_split(model, biases)

    everywhere: dict[str, tuple[str, ...]] = {}
    for bias in find_biases(model, add_missing_biases=True, with_untrained_pooler=False):
        known = everywhere.get(bias.module, ())
        everywhere[bias.module] = known if bias.parameter in known else (*known, bias.parameter)
    parameters = {bias.module: everywhere.get(bias.module, (bias.parameter,)) for bias in biases}

    if tokens is not None:
        _check_output_biases(biases, tokens)
    labels, logits = find_labels(model, head, config.num_labels, config.id2label, config.problem_type)
    values = _values(model, config, biases, head, labels, tokens)
    return Plan(
        biases=biases if tokens is None else tokens.in_model(biases),
        parameters=parameters,
        head=head,
        middle=frozenset(head).difference(class_head(model, config.task_type), pooler),
        labels=labels,
        logits=logits,
        labels_at=(logits or head[-1]) if labels is not None else None,
        tokens=tokens,
        values=values,
    )


def _tokens(model: nn.Module, config: BitFitConfig) -> AddedTokens | None:
    """The added tokens of an adapter: by its file, or by what the model has beyond its checkpoint."""
    if not awaits_tensors(config):
        return find_added_tokens(model, config.added_tokens)
    if config.added_tokens:
        return placed_tokens(model, config, others=is_bitfit(model))
    outputs = [m for m in model.modules() if isinstance(m, TokenRows) and isinstance(stock_module(m), nn.Linear)]
    if outputs:
        raise AddedTokensError(
            f"{type(model).__name__} makes a score for each token, and has an adapter with added tokens "
            f"({', '.join(sorted(outputs[0].modules_to_save))}), while this delta was trained without them; one "
            "model answers with one vocabulary. Load the delta onto a base of its own."
        )
    return None


def _check_output_biases(biases: list[Bias], tokens: AddedTokens) -> None:
    added = [bias.module for bias in biases if not bias.exists and f"{bias.module}.weight" in tokens.base_rows]
    if added:
        raise AddedTokensError(
            f"`add_missing_biases` would give {added[0]} a bias with an entry per token, and {tokens.count} tokens "
            "were added, which no checkpoint has. Leave the term `lm_head` out, or the added tokens."
        )


def _selection(
    model: nn.Module, config: BitFitConfig, modules_to_save: list[str] | None
) -> tuple[list[str], list[Bias]]:
    # Looked for once, and then named like any other module that is trained whole.
    wanted = config.train_untrained_pooler and class_head(model, config.task_type)
    pooler = untrained_pooler(model) if wanted else []
    excluded = config.exclude_modules
    if pooler and not (excluded is not None and any(fits(path, excluded) for path in pooler)):
        modules_to_save = [*(modules_to_save or []), *pooler]
    head = head_modules(model, config.task_type, modules_to_save, with_untrained_pooler=False)
    biases = select_biases(
        model,
        bias_terms=config.bias_terms,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        add_missing_biases=config.add_missing_biases,
        modules_to_save=modules_to_save,
        task_type=config.task_type,
        with_untrained_pooler=False,
    )
    return head, biases


def _not_in_checkpoint(model: nn.Module, biases: list[Bias], *, resized: Collection[str]) -> list[str]:
    """Modules among those to tune that the checkpoint did not have, such as the pooler of a masked language model's.

    Their weights are random and would be others in every process that loads the base. transformers marks the
    parameters that it has read from a checkpoint; in a model where none is marked, nothing is known. Parameters that
    were `resized` for added tokens have lost the mark.
    """
    modules = dict(walk(stock_root(model)))
    marks = {
        path: [
            getattr(parameter, "_is_hf_initialized", False) for parameter in modules[path].parameters(recurse=False)
        ]
        for path in dict.fromkeys(bias.module for bias in biases)
    }
    for path in {name.rpartition(".")[0] for name in resized} & marks.keys():
        del marks[path]
    missing = [path for path, marked in marks.items() if marked and not any(marked)]
    return missing if 2 * len(missing) < len(marks) else []


def _restrict(biases: list[Bias], only: Mapping[str, torch.Tensor]) -> list[Bias]:
    keys = {from_file(key) for key in only}
    kept = [bias for bias in biases if delta_key(bias.module, bias.parameter) in keys]
    if not kept:
        raise NoMatchError(
            f"None of the {len(keys)} tensors of the state dict belongs to a bias that the configuration selects."
        )
    return kept


def _values(
    model: nn.Module,
    config: BitFitConfig,
    biases: list[Bias],
    head: list[str],
    labels: Labels | None,
    tokens: AddedTokens | None,
) -> dict[str, Any]:
    rows = None if tokens is None else tokens.base_rows
    values: dict[str, Any] = {"bias_layout": encode_layout(biases if tokens is None else tokens.in_base(biases))}
    if tokens is not None:
        values["added_tokens"], values["base_vocab_size"] = tokens.count, tokens.start
    if head or config.task_type in PEFT_NAMES:
        values["modules_to_save"] = SavedNames(head)  # also an empty list is proof against what PEFT appends
    if labels is not None:
        values["num_labels"] = labels.num_labels
        values["id2label"] = dict(labels.id2label)
        values["problem_type"] = labels.problem_type
    if config.base_fingerprint is None:
        values["base_fingerprint"] = fingerprint(model, biases, base_rows=rows)
    if config.base_num_parameters is None:
        values["base_num_parameters"] = num_base_parameters(model, head, base_rows=rows) or None
    if not config.base_model_name_or_path:  # PEFT takes over the empty name of a model made from a config
        values["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if config.revision is None:
        name = config.base_model_name_or_path or values["base_model_name_or_path"]
        values["revision"] = base_commit(name, config.base_fingerprint or values["base_fingerprint"])
    if config.task_type is None and isinstance(model, PreTrainedModel):
        values["task_type"] = peft_task_type(model)
    if config.auto_mapping is None and isinstance(model, PreTrainedModel):
        # PEFT's place for the class that was trained; it fills it in only where there is no `task_type`.
        values["auto_mapping"] = class_record(model)
    return values
