"""Walking a model under its stock names, whatever has been wrapped around or injected into it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

# Attributes under which a wrapper keeps the module it stands in for: torch.compile, FSDP, activation checkpointing.
TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# A module under this name and that of a parameter beside it holds the adapters' copies of that parameter.
HOLDER = "bitfit_head_"

LINEAR, CONVOLUTION, NORM, MULTIHEAD = "linear", "convolution", "norm", "multihead"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)
# Quantized linears that do not subclass nn.Linear in every version. By type name, so that none has to be installed.
_QUANTIZED_LINEARS = frozenset(
    {
        *("Linear8bitLt", "Linear4bit", "HQQLinear", "EetqLinear", "FP8Linear", "FbgemmFp8Linear", "BitLinear"),
        *("QuantLinear", "TorchQuantLinear", "WQLinear_GEMM", "WQLinear_GEMV", "QLinear", "VQuantLinear"),
    }
)
# Models bring norm classes of their own: LlamaRMSNorm, T5LayerNorm, DebertaLayerNorm, ...
_NORM_NAME = re.compile(r"Norm(\dd)?$")


def stock_module(module: nn.Module) -> nn.Module:
    """The module of the stock model that `module` is or stands in for.

    Looks through PEFT layers, PEFT's wrappers of saved modules, `torch.compile`, FSDP and activation checkpointing.
    """
    while True:
        children = module._modules
        inner: nn.Module | None
        if isinstance(module, BaseTunerLayer) and children.get("base_layer") is not None:
            inner = children["base_layer"]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner = children["original_module"]
        else:
            inner = next((children[name] for name in TRANSPARENT if children.get(name) is not None), None)
        if inner is None:
            return module
        module = inner


def stock_root(model: nn.Module) -> nn.Module:
    """The stock model inside a `PeftModel`, a PEFT tuner, DDP, or any wrapper that [`stock_module`] knows."""
    while True:
        model = stock_module(model)
        if isinstance(model, PeftModel):
            model = model.base_model
        elif isinstance(model, BaseTuner):
            model = model.model
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields `(stock path, stock module)` for every module of the stock model `model`, in definition order.

    Unlike `named_modules`, a module that is registered in several places is yielded at each of them.
    """
    for path, module in _walk(model, ""):
        yield path, stock_module(module)


def saved_modules(model: nn.Module) -> list[str]:
    """Stock names of the modules and parameters that an adapter trains whole (PEFT's `modules_to_save`)."""
    found = []
    for path, module in _walk(model, ""):
        if _stands_for_saved(module):
            found.append(path)
        names = [name.removeprefix(HOLDER) for name in stock_module(module)._modules if name.startswith(HOLDER)]
        found += [f"{path}.{name}" if path else name for name in names]
    return found


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in stock_module(module)._modules.items():
        if child is not None and not name.startswith(HOLDER):
            yield from _walk(child, f"{path}.{name}" if path else name)


def _stands_for_saved(module: nn.Module) -> bool:
    while not isinstance(module, ModulesToSaveWrapper):
        inner = next((module._modules[name] for name in TRANSPARENT if module._modules.get(name) is not None), None)
        if inner is None:
            return False
        module = inner
    return True


def kind_of(module: nn.Module) -> str | None:
    """Which known kind of module this is: one whose `bias` is added to its output; `None` for all others."""
    if isinstance(module, nn.MultiheadAttention):
        return MULTIHEAD
    if isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__ in _QUANTIZED_LINEARS:
        return LINEAR
    if isinstance(module, _CONVOLUTIONS):
        return CONVOLUTION
    if isinstance(module, _NORMS):
        return NORM
    if _NORM_NAME.search(type(module).__name__):
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is not None and len(shape_of(weight)) == 1 and (bias is None or shape_of(bias) == shape_of(weight)):
            return NORM
    return None


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The full shape of a parameter, also of one that DeepSpeed ZeRO-3 has partitioned away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def bias_name(kind: str) -> str:
    """What a known kind of module calls its bias."""
    return "in_proj_bias" if kind == MULTIHEAD else "bias"


def own_bias(module: nn.Module, kind: str) -> torch.Tensor | None:
    """The bias vector of a module of a known kind, `None` if it has none."""
    bias: torch.Tensor | None = module._parameters.get(bias_name(kind))
    if bias is None and kind == LINEAR:
        bias = module._buffers.get("bias")  # some quantized linears (GPTQ, AWQ) keep it there
    return bias if bias is not None and len(shape_of(bias)) == 1 else None


def missing_bias_size(module: nn.Module, kind: str) -> int | None:
    """How long a bias added to `module` would be; `None` for a module that cannot be given one."""
    if kind == NORM:
        weight = module._parameters.get("weight")
        return shape_of(weight)[0] if weight is not None and len(shape_of(weight)) == 1 else None
    if kind == LINEAR:
        return getattr(module, "nf" if isinstance(module, Conv1D) else "out_features", None)
    return None
