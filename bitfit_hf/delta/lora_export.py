"""The tuned model as a plain PEFT LoRA adapter, for people who do not have `bitfit_hf`.

LoRA's option `bias="all"` stores whole biases beside its matrices, and `modules_to_save` stores the head. So an
adapter with one rank-1 module whose second matrix is zero, which changes nothing, carries `b_F = b_0 + δ` to where
only stock libraries are installed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import BitFitConfig
from ..errors import StockExportError, collect
from ..storage.files import CONFIG_FILE, WEIGHTS_FILE, encode_config, encode_tensors, write_bytes
from ..storage.fingerprint import check_base
from ..storage.keys import in_file
from ..terms import find_biases
from ..terms.base_bias import add_deltas
from ..terms.structure import stock_root, walk
from ..terms.survey import span_index
from ..terms.tasks import BY_PEFT_NAME
from ..tuner.added_tokens import base_rows_of
from ..tuner.places import find_places
from ..tuner.token_rows import parameter_of
from .applying import is_applied
from .value import BiasDelta


def export_stock(
    delta_or_model: BiasDelta | nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: nn.Module | str | None = None,
    adapter_name: str = "default",
) -> None:
    """
    Writes the tuned model as a plain LoRA adapter that stock `peft` and `transformers` load without `bitfit_hf`.

    The adapter holds the tuned biases themselves, not their deltas, so it needs the base's values: of the model at
    hand, or of the base that is loaded for it. Whoever loads it passes the number of labels. transformers' own ways,
    such as the first one here, have it from 5.18 on; older ones answer with an untuned model:

    ```python
    AutoModelForSequenceClassification.from_pretrained(
        "user/delta", adapter_kwargs={"subfolder": "stock"}, num_labels=3
    )
    PeftModel.from_pretrained(base_with_3_labels, "user/delta", subfolder="stock")
    ```

    Where tokens were added for the task, the adapter also holds their rows (LoRA's `trainable_token_indices`). The
    base has to be resized first, as for any such adapter of stock PEFT: `base.resize_token_embeddings(number)`, then
    `PeftModel.from_pretrained` or `base.load_adapter`. Language models with added tokens cannot be exported.

    Args:
        delta_or_model ([`BiasDelta`] or `nn.Module`): A delta, or a model with a BitFit adapter.
        folder (`str` or `os.PathLike`): Where to; made if it does not exist.
        base (`nn.Module` or `str`, *optional*):
            For a delta: the base model, or the name of its checkpoint. By default the checkpoint that the delta
            names is loaded, at its pinned revision.
        adapter_name (`str`, *optional*, defaults to `"default"`): For a model: which adapter.

    Raises:
        [`StockExportError`]: Stock PEFT could not represent this delta, or the base cannot be loaded.
        [`BaseModelMismatchError`]: `base` is another checkpoint than the delta's.
        [`DeltaIOError`]: A file cannot be written.
    """
    folder = Path(folder)
    for name, data in lora_files(delta_or_model, base=base, adapter_name=adapter_name).items():
        write_bytes(folder / name, data)


def lora_files(
    delta_or_model: BiasDelta | nn.Module,
    *,
    base: nn.Module | str | None = None,
    adapter_name: str = "default",
    named: BitFitConfig | None = None,
) -> dict[str, bytes]:
    """The content of the two files of [`export_stock`] by their name.

    Args:
        delta_or_model, base, adapter_name: As for [`export_stock`].
        named ([`BitFitConfig`], *optional*): Says what the base is called, instead of the delta's own.
    """
    if isinstance(delta_or_model, BiasDelta):
        delta = delta_or_model
        _refuse_added(delta)
        model = base if isinstance(base, nn.Module) else load_base(delta.config, base)
    else:
        delta, model = BiasDelta.from_model(delta_or_model, adapter_name), delta_or_model
        _refuse_added(delta)
    root = stock_root(model)
    if is_applied(model) or any(getattr(module, "merged", False) for module in root.modules()):
        raise StockExportError(
            "The model's biases are not those of its base: a delta was applied or merged into them. Take it out first "
            "(`BiasDelta.remove_`, `unmerge_adapter`), or pass `base=` a freshly loaded base."
        )
    trained_on, base_rows = delta.config.base_model_name_or_path, base_rows_of(root, delta.config)
    if not isinstance(delta_or_model, nn.Module):
        check_base(root, delta.config.base_fingerprint, delta_base=trained_on, base_rows=base_rows)
    _refuse_parameters(root, delta)
    biases = [bias for group in delta.biases.values() for bias in group]
    find_places(root, biases, delta.config.modules_to_save or [], base=trained_on, base_rows=base_rows)
    _refuse_shared_tokens(root, delta)
    carrier = _carrier(root, delta)
    config = LoraConfig(
        task_type=delta.config.task_type,
        base_model_name_or_path=(named or delta.config).base_model_name_or_path,
        revision=(named or delta.config).revision,
        auto_mapping=delta.config.auto_mapping,
        target_modules=re.escape(carrier),  # a string is a pattern for the whole path
        modules_to_save=_saved_modules(root, delta.config.modules_to_save or []) or None,
        trainable_token_indices=_token_indices(delta) or None,
        bias="all",
        r=1,
        lora_alpha=1,
        inference_mode=True,
    )
    return {
        CONFIG_FILE: encode_config(_json_values(config)),
        WEIGHTS_FILE: encode_tensors(_tensors(root, delta, carrier)),
    }


def load_base(config: BitFitConfig, name: str | None = None) -> nn.Module:
    """Loads the base of a delta with the class that its task needs.

    Args:
        config ([`BitFitConfig`]): The delta's.
        name (`str`, *optional*): Loads this checkpoint instead of the one that the configuration names.

    Raises:
        [`StockExportError`]: There is no name, no known class, or it cannot be loaded.
    """
    import transformers

    path = name or config.base_model_name_or_path
    mapping: Any = config.auto_mapping if isinstance(config.auto_mapping, Mapping) else {}
    task = BY_PEFT_NAME.get(str(config.task_type))
    class_name = task.auto_class if task is not None else mapping.get("base_model_class", "")
    auto_class = getattr(transformers, str(class_name), None)
    if not path or auto_class is None or not hasattr(auto_class, "from_pretrained"):
        raise StockExportError(
            f"The delta's base (name {path!r}, task type {config.task_type}, class {class_name or None!r}) cannot be "
            "loaded from what adapter_config.json says. Load it yourself and pass it as `base=`."
        )
    revision = None if name else config.revision
    try:
        return auto_class.from_pretrained(path, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise StockExportError(
            f"The delta's base {path!r} cannot be loaded: {error}\nLoad it yourself and pass it as `base=`."
        ) from error


def _refuse_added(delta: BiasDelta) -> None:
    added = [name for name, group in delta.biases.items() if not group[0].exists]
    if added:
        raise StockExportError(
            f"This delta gives biases to layers that have none in the base:{collect(added)}\nStock PEFT has no place "
            "for them. Share the delta itself, or a merged copy (`merge_and_unload`) where the architecture has a "
            "switch for biases."
        )


def _refuse_parameters(root: nn.Module, delta: BiasDelta) -> None:
    modules = dict(walk(root))
    parameters = [name for name in delta.config.modules_to_save or [] if name not in modules]
    if parameters:
        raise StockExportError(
            f"The head of {type(root).__name__} has parameters that lie in no module:{collect(parameters)}\nStock "
            "PEFT saves modules only. Share the delta itself, or a merged copy (`merge_and_unload`)."
        )


def _refuse_shared_tokens(root: nn.Module, delta: BiasDelta) -> None:
    """PEFT's layer for single tokens knows no bias, and what it finds tied to the embeddings it wraps by its name."""
    uses = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
    modules = dict(walk(root))
    shared = [name for name in delta.added if len(delta.added) > 1 or uses[id(parameter_of(modules, name))] > 1]
    if shared:
        raise StockExportError(
            f"The added tokens of this delta have rows in more than one layer of {type(root).__name__}:"
            f"{collect(sorted(shared))}\nStock PEFT would compute something else with them. Share the delta itself, "
            "or a merged copy (`merge_and_unload`)."
        )


def _token_indices(delta: BiasDelta) -> dict[str, list[int]]:
    start, count = delta.config.base_vocab_size or 0, delta.config.added_tokens or 0
    return {name.rpartition(".")[0]: list(range(start, start + count)) for name in delta.added}


def _carrier(root: nn.Module, delta: BiasDelta) -> str:
    """Path of the smallest layer that stock LoRA can wrap without a change to what the model computes."""
    head = delta.config.modules_to_save or []
    uses = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
    candidates = [
        (sum(_extents(module)), path)
        for path, module in walk(root)
        if path
        and isinstance(module, (nn.Linear, Conv1D))
        # `nn.MultiheadAttention` and Mamba read this one's weight past any wrapper.
        and path.rpartition(".")[2] != "out_proj"
        and uses[id(module.weight)] == 1
        and not any(f"{path}.".startswith(f"{leaf}.") for leaf in head)
    ]
    if not candidates:
        raise StockExportError(
            f"{type(root).__name__} has no Linear layer outside its head that a LoRA adapter could sit on. Share the "
            "delta itself, or a merged copy (`merge_and_unload`)."
        )
    return min(candidates)[1]


def _saved_modules(root: nn.Module, leaves: list[str]) -> list[str]:
    """What stock PEFT is told to save: the largest modules that hold leaves of the head and nothing else.

    For some tasks PEFT adds the names `classifier` and `score` by itself, and cannot wrap a module inside another that
    is wrapped. It goes by how a path ends, so a name that fits a module of the backbone is refused.
    """
    holders = [path for path, module in walk(root) if path and module._parameters]
    tops = []
    for leaf in leaves:
        parts = leaf.split(".")
        options = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        inside = ([holder for holder in holders if f"{holder}.".startswith(f"{top}.")] for top in options)
        tops.append(next(top for top, found in zip(options, inside) if set(found) <= set(leaves)))
    tops = list(dict.fromkeys(tops))
    others = [
        path
        for path, _ in walk(root)
        if path.endswith(tuple(tops)) and not any(f"{path}.".startswith(f"{top}.") for top in tops)
    ]
    if others:
        raise StockExportError(
            f"Stock PEFT goes by how paths end, so beside the head ({', '.join(tops)}) it would take these modules "
            f"for parts of it:{collect(others)}\nShare the delta itself, or a merged copy (`merge_and_unload`)."
        )
    return tops


def _extents(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def _tensors(root: nn.Module, delta: BiasDelta, carrier: str) -> dict[str, torch.Tensor]:
    modules = dict(walk(root))
    aliases = {bias.name: bias.aliases for bias in find_biases(root)}
    tensors = {}
    for name, change in delta.items():
        path, _, parameter = name.rpartition(".")
        base = modules[path]._parameters[parameter]
        assert base is not None  # added biases have been refused
        dtype = torch.promote_types(base.dtype, torch.float32)
        value = add_deltas(base.detach().cpu(), [(change, span_index(delta.biases[name]))], dtype=dtype)
        # Loading may put new parameters into the model, which are no longer tied to each other.
        for place in (name, *aliases.get(name, ())):
            tensors[in_file(_inside(place, carrier))] = value
    inputs, outputs = _extents(modules[carrier])
    tensors[in_file(f"{carrier}.lora_A.weight")] = torch.zeros(1, inputs)
    tensors[in_file(f"{carrier}.lora_B.weight")] = torch.zeros(outputs, 1)
    for name, rows in delta.added.items():
        tensors[in_file(f"{name.rpartition('.')[0]}.token_adapter.trainable_tokens_delta")] = rows
    return tensors | {in_file(name): tensor for name, tensor in delta.head.items()}


def _inside(name: str, carrier: str) -> str:
    """Where a parameter of the stock model is once LoRA has wrapped `carrier`."""
    path, _, parameter = name.rpartition(".")
    return f"{path}.base_layer.{parameter}" if path == carrier else name


def _json_values(config: LoraConfig) -> dict[str, Any]:
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
