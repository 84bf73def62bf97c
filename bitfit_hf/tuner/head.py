"""[`BitFitHead`]: one leaf module of the task head, trained whole and in float32, one copy per adapter."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..backends.quantized import is_quantized, plain_linear
from ..backends.sharded import gathered
from ..errors import AdapterNameError, DeltaMismatchError, UnsupportedLayerError
from .mixed import BASE, MixedBatch
from .precision import Float32ModuleDict


@dataclass(frozen=True)
class Labels:
    """What the head's outputs mean.

    Args:
        num_labels (`int`): Size of the head's last dimension.
        id2label (`dict[int, str]`): Their names.
        problem_type (`str`, *optional*): transformers' name of the loss: `regression`, ….
    """

    num_labels: int
    id2label: dict[int, str]
    problem_type: str | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Labels:
        """The labels that `model` has at present."""
        config: Any = model.config
        return cls(config.num_labels, dict(config.id2label), getattr(config, "problem_type", None))

    def give_to(self, model: PreTrainedModel) -> None:
        """Makes `model` answer with these labels."""
        config: Any = model.config
        config.num_labels = self.num_labels  # resets the names, so it comes first
        config.id2label = dict(self.id2label)
        config.label2id = {name: index for index, name in self.id2label.items()}
        config.problem_type = self.problem_type
        if "num_labels" in vars(model):
            vars(model)["num_labels"] = self.num_labels


class BitFitHead(ModulesToSaveWrapper):
    """
    PEFT's wrapper for a module that is trained whole, with what bias tuning needs beside it.

    The copies are float32 whatever the base's dtype, stay so when the model is cast, and cast their input. A head's
    answer is float32 too; a module in the middle of a half-precision model hands on the dtype that came in.

    An adapter may have another number of labels than the model's own head. The leaf that makes the logits carries the
    label names of every adapter and hands them to the model's config as adapters are switched, through whichever of
    PEFT's or transformers' entry points.

    Args:
        module_to_save (`nn.Module`): The module.
        adapter_name (`str`): The first adapter that has a copy of it.
        num_labels (`int`, *optional*): Rebuilds the copy with that many outputs.
        in_the_middle (`bool`, *optional*, defaults to `False`): Layers of the base come after it.
    """

    # PEFT's tools tell the adapters' tensors from the base's by this; `adapter_state_dict_load_map` names none.
    other_param_names = ("modules_to_save",)

    def __init__(
        self, module_to_save: nn.Module, adapter_name: str, *, in_the_middle: bool = False, **kwargs: Any
    ) -> None:
        self._in_the_middle = in_the_middle
        self._labels: dict[str | None, Labels] = {}  # by adapter; those of the stock model under `None`
        self._shown: str | None = None  # the adapter whose labels the model's config holds at present
        self._label_owner: tuple[PreTrainedModel] | None = None
        self._mixed: MixedBatch | None = None  # while a mixed batch runs
        self._tape: Any = None  # a `PerExample`, while per-example gradients are taken
        # ModulesToSaveWrapper's own __init__ would not pass the number of labels on to `update`.
        super(ModulesToSaveWrapper, self).__init__(module_to_save, adapter_name, **kwargs)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        self.modules_to_save = Float32ModuleDict()

    def update(
        self, adapter_name: str, tied_module: None = None, num_labels: int | None = None, **kwargs: Any
    ) -> None:
        """Adds `adapter_name`'s copy of the module; `num_labels` rebuilds it with that many outputs."""
        if adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = self._new_copy(num_labels)
        super().update(adapter_name, **kwargs)

    def _new_copy(self, num_labels: int | None) -> nn.Module:
        return float32_copy(self.original_module, num_labels)

    def live_path(self, path: str) -> str:
        """Where this wrapper is, without what other wrappers insert, given the stock path of what it stands for."""
        return path

    def is_weight(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter of a copy is one that weight decay is for: no bias, and no norm's."""
        return parameter.dim() > 1

    def forget(self, adapter_name: str) -> None:
        """Removes an adapter and all that is kept for it; nothing where there is none."""
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self._adapters.discard(adapter_name)
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
        self._follow()
        self._labels.pop(adapter_name, None)

    @property
    def device_of_base(self) -> torch.device:
        """Where the module that this stands for is."""
        return next((p.device for p in self.original_module.parameters()), torch.device("cpu"))

    def serves_any(self) -> bool:
        """Whether there is an adapter left."""
        return len(self.modules_to_save) > 0

    def adapter_state_dict(  # type: ignore[override]
        self, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """PEFT's hook for saving: the adapter's part of `state_dict`, whole also where the model is sharded."""
        return {
            name: gathered(tensor) for name, tensor in super().adapter_state_dict(adapter_name, state_dict).items()
        }

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Empty: [`load_tensors`] writes the head. PEFT's own loop ends in a bare `KeyError` for a missing tensor."""
        return {}

    def __getattr__(self, name: str) -> Any:
        # PEFT's wrapper hands on what it has not itself. A module's own `__deepcopy__` would copy that module alone.
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return super().__getattr__(name)

    # --- labels ---

    def carry_labels(self, model: PreTrainedModel, adapter_name: str, labels: Labels) -> None:
        """Makes this the leaf that keeps the model's label names in step with the active adapter.

        Args:
            model ([`~transformers.PreTrainedModel`]): Whose config follows.
            adapter_name (`str`): The adapter that `labels` belong to.
            labels ([`Labels`]): Its labels.
        """
        if self._label_owner is None:
            # In a tuple, so that `nn.Module` does not register the model as a child of its own head.
            self._label_owner = (model,)
            self._labels[None] = Labels.of(model)
        self._labels[adapter_name] = labels
        self._follow()

    def labels_of(self, adapter_name: str | None) -> Labels | None:
        """The labels of one adapter as they are now, if this leaf carries them; `None` asks for the stock model's."""
        self._take_in()
        return self._labels.get(adapter_name)

    def _take_in(self) -> None:
        # The user may have changed the names meanwhile, and transformers settles the problem type in the first batch.
        if self._label_owner is not None:
            self._labels[self._shown] = Labels.of(self._label_owner[0])

    def _follow(self) -> None:
        if self._label_owner is None:
            return
        self._take_in()
        active = [] if self.disable_adapters else self.active_adapters
        wanted = active[0] if active and active[0] in self._labels else None
        if wanted != self._shown:
            self._shown = wanted
            self._labels[wanted].give_to(self._label_owner[0])

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """PEFT's hook: which of the adapters to activate; raises [`AdapterNameError`] where there are several."""
        several = [] if isinstance(adapter_name, str) else [n for n in adapter_name if n in self.modules_to_save]
        if len(several) > 1:
            raise AdapterNameError(  # in PEFT's words at first, which people look for
                f"Only one adapter can be set at a time for ModulesToSaveWrapper, got {len(several)}: the adapters "
                f"{several} have a task head each, and a model answers with one head at a time. Activate one of them, "
                "or use `bitfit_hf.TaskBank` for several tasks in one batch."
            )
        return super().check_set_adapter(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._follow()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._follow()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        super().delete_adapter(adapter_name, new_active_adapters)
        self._follow()
        self._labels.pop(adapter_name, None)

    # --- forward ---

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.active_adapters:
            return self._forward_wrapped_passthrough(*args, **kwargs)
        module = self.modules_to_save[self.active_adapters[0]]
        inputs = [_in_dtype_of(module, value) for value in args]
        named = {name: _in_dtype_of(module, value) for name, value in kwargs.items()}
        if self._tape is not None:
            return self._handed_on(self._tape.head(self, module, (*inputs, *named.values())), args)
        return self._handed_on(module(*inputs, **named), (*args, *kwargs.values()))

    def _handed_on(self, result: Any, inputs: tuple[Any, ...]) -> Any:
        """What the module has computed, in the dtype that came in where layers of a half-precision base follow."""
        own = _dtype_of(self.original_module)
        if not self._in_the_middle or own is None or own.itemsize >= torch.float32.itemsize:
            return result
        came_in = (v.dtype for v in inputs if isinstance(v, torch.Tensor) and v.is_floating_point())
        return _cast(result, next(came_in, own))  # an embedding's input has no such dtype

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the batch was checked as a whole, and choices are folded into it by the time they get here."""

    def _mixed_batch_forward(self, input: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Any:
        # PEFT's version takes Linear, Embedding and Conv only, and stacks whatever it gets.
        assert self._mixed is not None
        factor = self._mixed.rows_per_example(self, input.shape[0])
        rows = [name for name in adapter_names for _ in range(factor)]
        outputs: list[torch.Tensor | None] = [None] * len(rows)
        for name in dict.fromkeys(rows):
            where = [i for i, other in enumerate(rows) if other == name]
            part: Any
            if name == BASE or name not in self.modules_to_save:
                part = _cast(self.original_module(input[where], *args, **kwargs), torch.float32)
            else:
                module = self.modules_to_save[name]
                part = module(_in_dtype_of(module, input[where]), *args, **kwargs)
            if not isinstance(part, torch.Tensor):
                raise UnsupportedLayerError(
                    f"A {type(self.original_module).__name__} in `modules_to_save` answers with more than one tensor, "
                    "so `adapter_names` cannot be applied per example. Run one batch per adapter, or use "
                    "`bitfit_hf.TaskBank`."
                )
            part = self._handed_on(part, (input,))
            for i, row in zip(where, part, strict=True):
                outputs[i] = row
        widths = {tuple(row.shape) for row in outputs if row is not None}
        if len(widths) > 1:
            raise UnsupportedLayerError(
                "The adapters in this batch have heads of different sizes "
                f"({', '.join(str(width[-1]) for width in sorted(widths))} outputs), which one tensor of logits "
                "cannot hold. Use `bitfit_hf.TaskBank`, which answers each example in its own task's shape."
            )
        return torch.stack(outputs)  # type: ignore[arg-type]

    # --- unloading ---

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's hook: the tuned head in the base's dtype when merging, else the base's own head."""
        names = self.active_adapters if adapter_names is None else [n for n in adapter_names if n in self._adapters]
        if not merge or not names:
            self._active_adapter = []
            self._follow()
            return self.original_module
        self._active_adapter = names[:1]
        self._follow()
        module = self.modules_to_save[names[0]]
        return module.to(_dtype_of(self.original_module) or torch.float32)


def float32_copy(module: nn.Module, num_labels: int | None) -> nn.Module:
    """An adapter's copy of a leaf of the head; `num_labels` rebuilds it with that many outputs."""
    if num_labels is None or num_labels == output_size(module):
        if is_quantized(module) and isinstance(module, nn.Linear):
            return plain_linear(module).requires_grad_(False)
        clone = copy.deepcopy(module).float()
    elif isinstance(module, (nn.Linear, Conv1D)):
        clone = resized(module, num_labels)
    else:
        raise DeltaMismatchError(
            f"The adapter has {num_labels} labels, but the model's head ends in a {type(module).__name__} of "
            f"{output_size(module)} outputs, which cannot be rebuilt. Load the base with `num_labels={num_labels}`."
        )
    return clone.requires_grad_(False)


def resized(module: nn.Linear | Conv1D, num_labels: int) -> nn.Module:
    """A new layer like `module`, float32, with `num_labels` outputs."""
    weight = module.weight
    inputs = module.in_features if isinstance(module, nn.Linear) else weight.shape[0]
    if isinstance(module, Conv1D):
        return Conv1D(num_labels, inputs).to(weight.device)
    clone = nn.Linear(inputs, num_labels, bias=module.bias is not None, device=weight.device, dtype=torch.float32)
    # transformers' own initialisation of a new head; a loaded delta overwrites it.
    nn.init.normal_(clone.weight, std=0.02)
    if clone.bias is not None:
        nn.init.zeros_(clone.bias)
    return clone


def output_size(module: nn.Module) -> int | None:
    """How many outputs the leaf module has, where its kind says so."""
    if isinstance(module, Conv1D):
        return module.nf
    for attribute in ("out_features", "out_channels"):
        if hasattr(module, attribute):
            return getattr(module, attribute)
    return None


def _in_dtype_of(module: nn.Module, value: Any) -> Any:
    # float32, unless FSDP's mixed precision has put a lower one into the module's place for as long as it computes.
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(_dtype_of(module) or torch.float32)
    return value


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        items = [_cast(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
