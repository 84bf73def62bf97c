"""What the tests of the tuner share: tuned models, and a stock model tuned by hand to hold them against.

[`add_by_hand`] is the oracle. It knows nothing of the library but the format of its files: it adds each delta into the
stock model's own parameter, found by name, and copies the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from architectures import Architecture, output_tensors
from packaging.version import Version
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from bitfit_hf import BitFitConfig, BitFitLayer
from bitfit_hf.tuner import BitFitHead

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]
needs_a_compiler = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="torch 2.6 does not compile BERT, be it tuned or not"
)


def config_for(arch: Architecture, **values: Any) -> BitFitConfig:
    """A configuration with which `arch` has something to tune."""
    return BitFitConfig(**{"add_missing_biases": arch.bias_free, **values})


def frozen(arch: Architecture) -> nn.Module:
    """A fresh stock model of `arch` whose outputs can be compared with a tuned one's to the last bit.

    It is frozen as tuning leaves it: on some processors matmul takes another path for weights that need a gradient.
    """
    return arch.build().requires_grad_(False)


def tune(arch: Architecture, adapter_name: str = "default", *, seed: int = 0, **values: Any) -> PeftModel:
    """A fresh model of `arch`, wrapped, in eval mode."""
    return get_peft_model(arch.build(seed), config_for(arch, **values), adapter_name=adapter_name).eval()


def tuned_parameters(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, nn.Parameter]]:
    """Deltas and head of an adapter, by the name that PyTorch sees."""
    for name, parameter in model.named_parameters():
        if adapter_name in name.split("."):
            yield name, parameter


@torch.no_grad()
def fill_(model: nn.Module, adapter_name: str = "default", *, seed: int = 1, std: float = 0.1) -> nn.Module:
    """Gives an adapter's deltas and head random values in place, as if they had been trained; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in tuned_parameters(model, adapter_name):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def file_tensors(model: nn.Module, adapter_name: str = "default") -> Tensors:
    """Copies of what `save_pretrained` writes for an adapter, without PEFT's prefix."""
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {name.removeprefix(PREFIX): tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def add_by_hand(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, sign: int = 1) -> nn.Module:
    """Writes a delta (without slices) and its head into a stock model's own parameters; returns the model."""
    for name, value in tensors.items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if not last.startswith("bitfit_"):
            getattr(module, last).copy_(value)
        elif getattr(module, last.removeprefix("bitfit_"), None) is None:
            module.register_parameter(last.removeprefix("bitfit_"), nn.Parameter(value.clone()))
        else:
            getattr(module, last.removeprefix("bitfit_")).add_(value, alpha=sign)
    return model


def by_hand(arch: Architecture, tuned: nn.Module, adapter_name: str = "default", *, seed: int = 0) -> nn.Module:
    """A stock model of `arch` that computes what the tuned one should."""
    return add_by_hand(arch.build(seed), file_tensors(tuned, adapter_name))


@torch.no_grad()
def outputs(model: nn.Module, arch: Architecture, *, batch_size: int = 2, **kwargs: Any) -> list[torch.Tensor]:
    """Every float tensor that the model answers with."""
    found = output_tensors(model(**arch.inputs(batch_size), **kwargs))
    assert found
    return [tensor.clone() for tensor in found]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor, as integers: they can be compared where there are NaN, and 0.0 is not -0.0."""
    of_width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(of_width[tensor.element_size()])


def identical(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal to the last bit, dtypes included."""
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True)
    )


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest difference between two lists of tensors; infinite where the shapes differ."""
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return float("inf")
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(first, second, strict=True))


def base_tensors(model: nn.Module) -> Tensors:
    """Copies of the stock model's own parameters and buffers, by stock name, of a stock or a tuned model."""
    found = {}
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in state.items():
        parts = name.removeprefix(PREFIX).split(".")
        if not any("bitfit_" in part for part in parts) and "modules_to_save" not in parts:
            kept = [part for part in parts if part not in ("base_layer", "original_module")]
            found[".".join(kept)] = tensor.detach().clone()
    return found


def same_tensors(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts have equal names, dtypes and bits."""
    return first.keys() == second.keys() and identical(list(first.values()), [second[name] for name in first])


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a failed or undone operation has to leave as it was; compare with `==`."""
    config = getattr(model, "config", None)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "tensors": [(name, id(t), t.requires_grad, t.dtype, t.tolist()) for name, t in tensors.items()],
        "wrappers": [name for name, m in model.named_modules() if isinstance(m, (BitFitLayer, BitFitHead))],
        "attributes": sorted(set(vars(model)) - {"_is_quantized_training_enabled"}),
        "peft": (hasattr(model, "peft_config"), getattr(model, "_hf_peft_config_loaded", False)),
        "adapters": sorted(getattr(model, "peft_config", ())),
        "labels": getattr(config, "id2label", None) and (config.num_labels, config.id2label, config.label2id),
        "problem": getattr(config, "problem_type", None),
        "training": [module.training for module in model.modules()],
    }
