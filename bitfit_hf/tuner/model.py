"""[`BitFitModel`]: the tuner that PEFT instantiates for a [`BitFitConfig`]."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..backends.quantized import keep_trainable
from ..backends.sharded import gathered
from ..errors import AdapterNameError, DeltaMismatchError, MixedBatchError
from ..storage.keys import FILE_PREFIX, PREFIX, from_file, in_file, stock_path
from ..terms.token_tensors import check_rows, note_rows, set_rows
from .head import BitFitHead
from .injection import wrap_head, wrap_layers, wrap_tokens
from .layer import BitFitLayer
from .lifecycle import about_to_save, await_tensors, awaits_tensors, begin_anew, restore_given_base, tensors_loaded
from .loading import loading_in_progress
from .merging import unload
from .mixed import MixedBatch, check_adapter_names, check_number, sequences_per_example
from .plan import make_plan
from .state import (
    StrictLoader,
    delta_parameters,
    forget_configs,
    head_leaves,
    head_tensors,
    load_tensors,
    read_labels,
    remove_adapter,
    tuned_layers,
)


class BitFitModel(BaseTuner):
    r"""
    Injects [`BitFitLayer`]s into a model: bias-only fine-tuning as a PEFT method.

    Made by `get_peft_model(model, BitFitConfig(...))`, `model.add_adapter(BitFitConfig(...))` and all of PEFT's and
    transformers' ways of loading. Nothing is changed before every check has passed.

    Args:
        model (`nn.Module`): The base model.
        config ([`BitFitConfig`]): What to tune.
        adapter_name (`str`): Name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Makes the deltas on the meta device.

    Example:

    ```python
    >>> from bitfit_hf import BitFitConfig
    >>> from peft import get_peft_model
    >>> from transformers import AutoModelForSequenceClassification

    >>> base = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
    >>> model = get_peft_model(base, BitFitConfig())
    >>> model.print_trainable_parameters()
    trainable params: 104,450 || all params: 109,588,228 || trainable%: 0.0953
    ```
    """

    prefix = PREFIX
    tuner_layer_cls = BitFitLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # as PEFT declares it

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        # PeftModel hands over a dict; a bare configuration comes from injection into the model itself, which is how
        # transformers' `add_adapter`, `load_adapter` and `from_pretrained` work.
        in_place = isinstance(peft_config, PeftConfig)
        config: Any = peft_config if in_place else peft_config[adapter_name]  # type: ignore[index]
        try:
            with warnings.catch_warnings():
                # Several adapters on one model are what the caller asked for.
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except BaseException:
            configs = getattr(model, "peft_config", None)
            if isinstance(configs, dict) and configs.get(adapter_name) is config:
                del configs[adapter_name]
            forget_configs(model)
            raise
        if in_place and awaits_tensors(config) and isinstance(model, PreTrainedModel):
            model.__dict__["_load_pretrained_model"] = StrictLoader(adapter_name)

    # --- injection ---

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Adds an adapter to `model` in place; PEFT's extension point.

        PEFT's own loop skips what lies below a layer that it has wrapped. Here a wrapped module can hold others to be
        wrapped (attention with a free `q_bias` holds Linear layers), so this one goes by the plan.

        Args:
            model (`nn.Module`): The base model.
            adapter_name (`str`): Its configuration is in `peft_config`.
            autocast_adapter_dtype (`bool`, *optional*): Without effect: deltas and heads always are float32.
            low_cpu_mem_usage (`bool`, *optional*): Makes the deltas on the meta device.
            state_dict (`dict`, *optional*): Restricts the adapter to the modules that have tensors here.
        """
        config: Any = self.peft_config[adapter_name]
        restore_given_base(config)
        loading = loading_in_progress()
        if loading is None:
            plan = make_plan(model, config, adapter_name, only=state_dict)
        else:
            tensors = loading.read(config)
            await_tensors(config)
            plan = make_plan(model, config, adapter_name, only=state_dict)
            plan.check_fit(model, tensors, where=f"adapter {adapter_name!r}")
        if plan.tokens is not None:
            set_rows(model, plan.tokens.tensors, max(plan.tokens.tensors.rows, plan.tokens.stop))
        first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        keep_trainable(model)
        trainable = [] if first else [(p, p.requires_grad) for p in model.parameters()]

        device = torch.device("meta") if low_cpu_mem_usage else None
        state: Any = {"active": self.active_adapters, "inference_mode": config.inference_mode}
        wrap_layers(model, adapter_name, plan, **state, device=device)
        self.targeted_module_names.extend(p for p in plan.by_module() if p not in self.targeted_module_names)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if first:
            self._mark_only_adapters_as_trainable(model)
        if plan.tokens is not None:
            wrap_tokens(model, adapter_name, plan.tokens, **state)
        wrap_head(model, adapter_name, plan, **state)
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad
        plan.describe(config)
        note_rows(model)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("BitFitModel.inject_adapter goes by its plan and never calls this.")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Does nothing: deltas and heads are float32 in any case."""

    # --- forward ---

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook for `adapter_names`: one adapter per example of the batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        check_adapter_names(adapter_names, list(self.peft_config))
        given = kwargs.get("input_ids")  # to `generate`, whose first forward may be that of an encoder alone
        check_number(adapter_names, None if given is None else len(given))
        if self.training:
            raise MixedBatchError(
                "Cannot pass `adapter_names` when the model is in training mode. It is for inference: call "
                "`model.eval()` first."
            )
        if any(layer.merged for _, layer in tuned_layers(self.model)):
            raise MixedBatchError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. It "
                "needs the base's own biases."
            )
        parts = [module for module in self.modules() if isinstance(module, (BitFitLayer, BitFitHead))]
        with MixedBatch(self.model, parts, adapter_names, sequences_per_example(kwargs)):
            yield

    # --- combining ---

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        r"""
        Adds the adapter `δ = Σ w_i δ_i`.

        The head is no difference to anything, so a weighted sum of heads has no meaning: the new adapter gets a copy
        of the first one's head, with its labels, and of its rows of added tokens.

        Args:
            adapters (`Sequence[str]`): Adapters that tune the same biases.
            weights (`Sequence[float]`): One for each.
            adapter_name (`str`): Name of the new adapter.
            combination_type (`str`, *optional*, defaults to `"linear"`): The only one that biases have.

        Raises:
            [`AdapterNameError`]: A name is unknown or taken, or the numbers of names and weights differ.
            [`DeltaMismatchError`]: The adapters tune different biases, or another than the first has added tokens.
        """
        adapters, weights = list(adapters), [float(weight) for weight in weights]
        if combination_type != "linear":
            raise AdapterNameError(f"`combination_type` must be 'linear' for biases, got {combination_type!r}.")
        if adapter_name in self.peft_config:
            raise AdapterNameError(f"There is an adapter {adapter_name!r} already; choose another name.")
        if not adapters or len(adapters) != len(weights):
            raise AdapterNameError(
                f"Got {len(adapters)} adapters and {len(weights)} weights; give one weight for each."
            )
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise AdapterNameError(f"There are no adapters {unknown}; the model has {list(self.peft_config)}.")
        sources = [delta_parameters(self.model, name) for name in adapters]
        for name, source in zip(adapters, sources, strict=True):
            if {k: v.shape for k, v in source.items()} != {k: v.shape for k, v in sources[0].items()}:
                raise DeltaMismatchError(
                    f"The adapters {adapters[0]!r} and {name!r} tune different biases; their deltas cannot be added."
                )
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        if not configs[0].added_tokens and any(config.added_tokens for config in configs):
            raise DeltaMismatchError(
                f"The adapter {adapters[0]!r}, whose head the new one gets, has no added tokens and another has: name "
                "that one first."
            )
        read_labels(self.model, adapters[0], configs[0])
        config: Any = copy.deepcopy(configs[0])
        begin_anew(config)
        await_tensors(config)  # it tunes what the first one tunes
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        with torch.no_grad():
            for name, target in delta_parameters(self.model, adapter_name).items():
                target.copy_(sum(weight * source[name] for weight, source in zip(weights, sources, strict=True)))  # type: ignore
            first_head = head_tensors(self.model, adapters[0])
            for name, tensor in head_tensors(self.model, adapter_name).items():
                tensor.copy_(first_head[name])
        tensors_loaded(config)
        self.set_requires_grad(adapter_name, adapter_name in self.active_adapters)

    # --- merging and unloading ---

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into the base's stored biases, in all layers or, where one refuses, in none.

        Args:
            adapter_names (`list[str]`, *optional*): What to merge; the active adapters by default.
            safe_merge (`bool`, *optional*, defaults to `False`): Refuses a result with NaN or Inf.

        Raises:
            [`MergeError`]: The result is not finite, or a layer has no place for a bias.
        """
        for _, layer in tuned_layers(self.model):
            layer.check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # PEFT's version does not look inside the layers that it takes out.
        return unload(self.model, merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)

    # --- state dict ---

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        check_rows(model)
        wanted = set(delta_parameters(model, adapter_name))  # a tied delta once
        deltas = {}
        for key, tensor in state_dict.items():
            name = cls._remove_adapter_name_from_key(key, adapter_name)
            if key != name and from_file(name) in wanted:
                deltas[key] = gathered(tensor).to(torch.float32)
        saved = {cls._remove_adapter_name_from_key(key, adapter_name): tensor for key, tensor in deltas.items()}
        for path, leaf in head_leaves(model):
            place = leaf.live_path(path)
            live = next(key for key in (in_file(place), place) if _has(state_dict, key))
            inner = {k.removeprefix(f"{live}."): v for k, v in state_dict.items() if k.startswith(f"{live}.")}
            saved |= {stock_path(f"{path}.{k}"): v for k, v in leaf.adapter_state_dict(adapter_name, inner).items()}
        read_labels(model, adapter_name, config)
        about_to_save(config, saved)
        # PEFT goes on to look for token embeddings in this dictionary, its own selection of the one that was passed,
        # and would add whole matrices where the model was resized or `target_modules` names an output layer.
        for key in list(state_dict):
            if key in deltas:
                state_dict[key] = deltas[key]
            elif "modules_to_save" not in key.split("."):
                del state_dict[key]
        return deltas

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        prefix = FILE_PREFIX if key.startswith(FILE_PREFIX) else ""
        name = stock_path(super()._remove_adapter_name_from_key(key, adapter_name))
        # As PEFT finds the rows of added tokens when it looks for the layer of token embeddings.
        return prefix + name.replace(".modules_to_save.", ".")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        # PEFT's route: the one place that sees the tensors of a file. They are written here, since PEFT would drop
        # what does not fit in silence; it then gets the tensors that are in the model already.
        loading = None if awaits_tensors(config) else loading_in_progress()
        try:
            expected = config.weights_digest if loading is None else loading.check_again(model)
            load_tensors(model, adapter_name, state_dict, expected_digest=expected)
        except BaseException:
            if awaits_tensors(config):  # not a reload into an adapter that was here before
                remove_adapter(model, adapter_name)
            raise
        tensors_loaded(config)
        tensors = [*delta_parameters(model, adapter_name).values(), *head_tensors(model, adapter_name).values()]
        live = set(map(id, tensors))
        return {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in live}


def _has(state_dict: Mapping[str, torch.Tensor], path: str) -> bool:
    return any(key.startswith(f"{path}.") for key in state_dict)
