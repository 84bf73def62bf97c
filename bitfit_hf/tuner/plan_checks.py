"""What refuses an injection whatever it is going to tune: the model, as it is, cannot take the adapter."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import BitFitConfig
from ..errors import AdapterNameError, DeltaMismatchError, UnsupportedLayerError
from ..terms import Bias
from ..terms.base_bias import overwritten
from ..terms.structure import stock_root, walk
from .head import BitFitHead
from .layer import BitFitLayer
from .lifecycle import awaits_tensors
from .reading import owners
from .state import is_bitfit


def check_name(model: nn.Module, adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name:
        raise AdapterNameError(f"An adapter's name must not be empty or hold a dot, got {adapter_name!r}.")
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    taken = parts - {
        name
        for m in model.modules()
        if isinstance(m, (BitFitLayer, BitFitHead))
        for name in m._get_available_adapters()
    }
    if adapter_name in taken:
        # PEFT finds the tensors of other adapters by their name in the path, and would leave this module out.
        raise AdapterNameError(f"The model has a module named {adapter_name!r}; choose another name for the adapter.")


def check_head(model: nn.Module, config: BitFitConfig) -> None:
    """A delta's head needs a model that has one; it is missing where a backbone or a language model is loaded."""
    if not awaits_tensors(config) or not config.modules_to_save:
        return
    paths = [path for path, _ in walk(stock_root(model))] + [name for name, _ in stock_root(model).named_parameters()]
    if not any(path == name or path.endswith(f".{name}") for name in config.modules_to_save for path in paths):
        names = [name for name in config.modules_to_save if "." in name] or config.modules_to_save
        raise DeltaMismatchError(
            f"The delta has a head ({', '.join(names)}; task type {config.task_type}), and {type(model).__name__} has "
            "no such modules. Load the base with the class of its task, such as "
            "`AutoModelForSequenceClassification`."
        )


def check_not_applied(model: nn.Module) -> None:
    """An adapter on top of an applied delta would be one for a base that exists nowhere else."""
    if not is_bitfit(model) and next(overwritten(dict(walk(stock_root(model)))), None) is not None:
        raise UnsupportedLayerError(
            f"A delta is written into the biases of this {type(model).__name__} (`load_delta`, `apply_`), so an "
            "adapter that is trained on it would fit no checkpoint. Take the delta out (`delta.remove_(model)`) or "
            "load the base again. To train on, load the delta as an adapter: `PeftModel.from_pretrained(base, "
            "delta, is_trainable=True)`. To keep it for good, save the model and load that as a new base."
        )


def check_free(modules: Mapping[str, nn.Module], targets: list[str], head: list[str]) -> None:
    for name in dict.fromkeys([*targets, *head]):
        if not name:
            raise UnsupportedLayerError(
                "The model itself is a single layer, which PEFT cannot wrap. Put it into a container: "
                "`nn.Sequential(layer)`."
            )
        module = modules.get(name)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(
            module, (BitFitLayer, BitFitHead)
        ):
            raise UnsupportedLayerError(
                f"{name} is wrapped by another PEFT method already ({type(module).__name__}). BitFit cannot be mixed "
                "with it on one model: unload that adapter first, or load a fresh base."
            )


def check_read_once(model: nn.Module, targets: list[str], head: list[str]) -> None:
    """A parameter of the head, and the biases of the module that holds it, are read in the same way."""
    modules = dict(walk(stock_root(model)))
    for name in head:
        path = name.rpartition(".")[0]
        if name not in modules and (
            path in targets or any(isinstance(owner, BitFitLayer) for owner in owners(modules[path]).values())
        ):
            raise UnsupportedLayerError(
                f"{name} cannot be trained whole on a model in which biases of {path} are tuned. Leave {name} out of "
                f"`modules_to_save`, or {path} out of the tuned modules with `exclude_modules`."
            )


def check_not_split(model: nn.Module, biases: list[Bias]) -> None:
    """FSDP lends a layer its whole bias to compute with; under tensor parallelism a layer computes with its slice."""
    modules = dict(walk(stock_root(model)))
    split = [b.name for b in biases if hasattr(modules[b.module]._parameters.get(b.parameter), "full_tensor")]
    if split and not any(type(module).__name__.startswith("FSDP") for module in model.modules()):
        raise UnsupportedLayerError(
            f"{split[0]} and {len(split) - 1} other biases are split over devices by tensor parallelism, under which "
            "deltas are not supported. Load the model without `tp_plan`; FSDP2 shards a model of any size."
        )
