"""The tensors of an adapter in a live model, by the names they have in a file, and loading them all or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..backends.sharded import put_back, write_whole
from ..config import BitFitConfig
from ..errors import DeltaFormatError, DeltaMismatchError, collect
from ..notices import notice
from ..storage.files import check_digest, check_values
from ..storage.keys import PREFIX, delta_key, from_file, stock_path
from ..terms.structure import stock_root
from ..terms.token_tensors import restore_rows
from .head import BitFitHead
from .head_parameter import HeadParameter
from .layer import BitFitLayer
from .lifecycle import set_labels, tensors_loaded
from .token_rows import TokenRows

logger = logging.getLogger(__name__)


def tuned_layers(model: nn.Module) -> Iterator[tuple[str, BitFitLayer]]:
    """The BitFit layers of a model, by stock path."""
    for name, module in stock_root(model).named_modules():
        if isinstance(module, BitFitLayer):
            yield stock_path(name), module


def head_leaves(model: nn.Module) -> Iterator[tuple[str, BitFitHead]]:
    """The wrapped parts of a model's head, by stock path."""
    for name, module in stock_root(model).named_modules():
        if isinstance(module, BitFitHead):
            yield stock_path(name), module


def is_bitfit(model: nn.Module) -> bool:
    """Whether BitFit layers are injected in `model`."""
    return next(tuned_layers(model), None) is not None


def delta_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The deltas of an adapter, live, by their name in a file without PEFT's prefix; a tied one once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, layer in tuned_layers(model):
        for parameter in layer.bias_parameters:
            deltas = getattr(layer, PREFIX + parameter)
            if adapter_name in deltas and id(deltas[adapter_name]) not in seen:
                seen.add(id(deltas[adapter_name]))
                found[delta_key(path, parameter)] = deltas[adapter_name]
    return found


def head_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """Parameters and buffers of an adapter's head, live, by their stock name."""
    return {
        stock_path(f"{path}.{name}"): tensor
        for path, leaf in head_leaves(model)
        if adapter_name in leaf.modules_to_save
        for name, tensor in leaf.modules_to_save[adapter_name].state_dict(keep_vars=True).items()
    }


def read_labels(model: nn.Module, adapter_name: str, config: BitFitConfig) -> None:
    """Takes an adapter's labels, as they are now, into its configuration: called before that is saved or copied.

    Raises:
        [`ConfigError`]: The model's config holds labels that no head of this size could be loaded with.
    """
    for _, leaf in head_leaves(model):
        labels = leaf.labels_of(adapter_name)
        if labels is not None:
            set_labels(config, labels.num_labels, labels.id2label, labels.problem_type, adapter_name=adapter_name)


def check_fit(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], *, where: str) -> None:
    """Compares the names and shapes of the tensors that a model needs and that a file has.

    Raises:
        [`DeltaMismatchError`]: They differ; all differences are named at once.
    """
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is not expected" for name in given if name not in expected]
    problems += [
        f"{name} has shape {list(given[name].shape)}, the model needs {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        raise DeltaMismatchError(
            f"{where}: the tensors of this delta do not fit the model:{collect(problems)}\n"
            "Load it onto the model class and base that its adapter_config.json names, or save it again."
        )


def load_tensors(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor], *, expected_digest: str | None
) -> None:
    """Writes a file's tensors into an adapter: all of them, after every check, or none.

    Args:
        model (`nn.Module`): With the adapter injected.
        adapter_name (`str`): Which one.
        tensors (`Mapping[str, torch.Tensor]`): Delta and head by their key in the file, with or without PEFT's prefix.
        expected_digest (`str`, *optional*): Of the configuration that came with them.

    Raises:
        [`DeltaFormatError`]: The tensors are not float32, not finite, or not those of the configuration.
        [`DeltaMismatchError`]: They are not the ones that the adapter needs.
    """
    given = {from_file(key): tensor for key, tensor in tensors.items()}
    where = f"adapter {adapter_name!r}"
    if len(given) != len(tensors):
        raise DeltaFormatError(f"{where}: the file names a tensor twice; fetch the delta again.")
    check_values(given, where=where)
    put_back(model)
    live = {**delta_parameters(model, adapter_name), **head_tensors(model, adapter_name)}
    check_fit(live, given, where=where)
    check_digest(given, expected_digest, where=where)
    with torch.no_grad():
        for name, target in live.items():
            if target.is_meta:
                _materialise(model, adapter_name, target, given[name])
            else:
                write_whole(target, given[name])


def _materialise(model: nn.Module, adapter_name: str, empty: torch.Tensor, value: torch.Tensor) -> None:
    """Gives a tensor made under `low_cpu_mem_usage=True` its memory, on the device of its layer."""
    made = None
    for _, layer in tuned_layers(model):
        for parameter in layer.bias_parameters:
            deltas = getattr(layer, PREFIX + parameter)
            if adapter_name in deltas and deltas[adapter_name] is empty:  # in several places where it is tied
                if made is None:
                    made = nn.Parameter(value.to(layer.device_of_base), requires_grad=empty.requires_grad)
                deltas[adapter_name] = made
    if made is not None:
        return
    for _, leaf in head_leaves(model):
        if adapter_name not in leaf.modules_to_save:
            continue
        module = leaf.modules_to_save[adapter_name]
        for name, tensor in module.state_dict(keep_vars=True).items():
            if tensor is empty:
                wanted = any(p.requires_grad for p in module.parameters())
                inner, _, last = name.rpartition(".")
                owner = module.get_submodule(inner)
                setattr(owner, last, nn.Parameter(value.to(leaf.device_of_base), requires_grad=wanted))


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter out of a model again, with every wrapper that then serves no adapter."""
    root = stock_root(model)
    for name, module in reversed(list(root.named_modules())):
        if isinstance(module, (BitFitLayer, BitFitHead)):
            module.forget(adapter_name)
            if not module.serves_any():
                take_out(root, name, module)
    if not any(isinstance(module, TokenRows) for module in root.modules()):
        restore_rows(root)
    configs = getattr(root, "peft_config", None)
    if isinstance(configs, dict):
        configs.pop(adapter_name, None)
    forget_configs(root)


def forget_configs(root: nn.Module) -> None:
    """Removes what marks a stock model as having adapters, once it has none."""
    if not getattr(root, "peft_config", None):
        vars(root).pop("peft_config", None)
        vars(root).pop("_hf_peft_config_loaded", None)  # the class says False


def take_out(
    root: nn.Module,
    name: str,
    wrapper: BitFitLayer | BitFitHead,
    *,
    merge: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """Takes the wrapper at the live path `name` out of a model, merged or not."""
    parent, _, child = name.rpartition(".")
    inner = wrapper.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
    if isinstance(wrapper, HeadParameter):
        delattr(root.get_submodule(parent), child)  # it stands for nothing but a parameter beside it
    else:
        setattr(root.get_submodule(parent), child, inner)


class StrictLoader:
    """Stands in for `model._load_pretrained_model` while transformers loads one adapter.

    `AutoModelFor….from_pretrained(<delta>)` and `model.load_adapter` inject the adapter, read its file, and have no
    hook after that: missing or broken tensors would pass in silence, and the model's dtype would be forced on a
    float32 delta. The one seam is the method that they call on the instance. This replacement removes itself when
    called.

    Args:
        adapter_name (`str`): The adapter that is being loaded.
    """

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name

    def __call__(self, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, **kwargs: Any) -> Any:
        from transformers.utils.loading_report import LoadStateDictInfo

        from ..storage.files import read_tensors

        vars(model).pop("_load_pretrained_model", None)
        if next(reversed(model.peft_config)) != self.adapter_name:
            return model._load_pretrained_model(
                model=model,
                state_dict=state_dict,
                checkpoint_files=checkpoint_files,
                load_config=load_config,
                **kwargs,
            )
        config = model.peft_config[self.adapter_name]
        try:
            tensors = state_dict
            if not tensors:
                (file,) = checkpoint_files
                if not str(file).endswith(".safetensors"):
                    raise DeltaFormatError(
                        f"{file} is a pickle. Pickled weights can run code and are never read: save the delta again "
                        "with safetensors."
                    )
                tensors = read_tensors(file)
            load_tensors(model, self.adapter_name, tensors, expected_digest=config.weights_digest)
        except BaseException:
            remove_adapter(model, self.adapter_name)
            raise
        tensors_loaded(config)
        head = sorted({path for path, leaf in head_leaves(model) if self.adapter_name in leaf.modules_to_save})
        if head:
            notice(
                logger,
                f"The delta has brought its head ({', '.join(head)}): what the report on loading the base says of it, "
                "newly initialized or missing, is settled.",
            )
        return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None
