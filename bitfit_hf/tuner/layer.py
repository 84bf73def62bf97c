"""[`BitFitLayer`]: a layer of the base model together with the deltas of its biases, one per adapter."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..backends.sharded import is_sharded
from ..errors import MergeError, UnsupportedLayerError
from ..storage.keys import PREFIX
from ..terms import Bias
from ..terms.base_bias import base_bias, forget, kept_bias, put_back, write_over
from ..terms.survey import span_index
from .layer_deltas import index_name
from .layer_kinds import features
from .mixed_layer import MixedBatchLayer
from .reading import install, stock_class, uninstall

if TYPE_CHECKING:
    from .head import BitFitHead


class BitFitLayer(MixedBatchLayer, BaseTunerLayer):
    r"""
    Wraps a layer of any kind and lets it compute with `b_0 + Σ δ` over its active adapters.

    The deltas are float32 parameters `bitfit_<parameter>.<adapter>` that start at zero, `bitfit_bias.default` for a
    Linear. `b_0 + δ` is formed in float32 and cast once to the dtype of `b_0` (of the weight where the layer has no
    bias), then read by the layer's own code, see [`bitfit_hf.tuner.reading`].

    Args:
        base_layer (`nn.Module`): The layer to tune.
        parameters (`Sequence[str]`): Names of its bias parameters that may be tuned.
    """

    def __init__(self, base_layer: nn.Module, parameters: Sequence[str]) -> None:
        super().__init__(base_layer, parameters)
        self.adapter_layer_names = tuple(PREFIX + name for name in self.bias_parameters)
        # Layer and name of the biases that are the same Parameter as this layer's, which are merged there.
        self._tied: dict[str, tuple[BitFitLayer, str]] = {}
        self._tape: Any = None  # a `PerExample`, while per-example gradients are taken
        self._own_forward = False  # then: whether it is the layer's own forward that runs
        self._head: tuple[BitFitHead, ...] = ()
        if not self._adds_to_output:
            install(base_layer, self.bias_parameters, owner=self)

    # --- computing ---

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Runs the base layer, whose own code reads [`~BitFitLayer.effective_bias`] where it reads its bias.

        Args:
            args, kwargs: What the base layer takes.
            adapter_names (`Sequence[str]`, *optional*): One adapter for each example of the batch.
        """
        if adapter_names is not None and self._only is None:
            return self._mixed_batch_forward(adapter_names, *args, **kwargs)
        if self._tape is not None:
            return self._forward_per_example(self._tape, *args, **kwargs)
        result = self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        return self._add_to_output(result) if self._adds_to_output else result

    def _forward_per_example(self, tape: Any, *args: Any, **kwargs: Any) -> Any:
        self._own_forward = True
        try:
            result = self.base_layer(*tape.shared_input(self, args), **kwargs)
        finally:
            self._own_forward = False
        if "bias" not in self.bias_parameters:
            return result  # its vectors are read inside, one row per example
        if self._adds_to_output:
            with torch.no_grad():
                added = self._add_to_output(torch.zeros((), dtype=result.dtype, device=result.device))
            result = result + added
        return tape.tap(self, result)

    def effective_bias(self, parameter: str, base: torch.Tensor | None) -> torch.Tensor | None:
        """`b_0 + Σ δ` of the adapters in use, in the dtype of `b_0`; `base` itself if there are none."""
        if self._mixed is not None and self._only is None:
            raise UnsupportedLayerError(
                f"The `{parameter}` of a {stock_class(self.base_layer).__name__} layer is read by other code than the "
                "layer's own forward, which knows nothing of `adapter_names`. Run one batch per adapter, or use "
                "`bitfit_hf.TaskBank`."
            )
        if base is not None and (base.is_meta or is_sharded(base)):
            return base  # offloaded or in slices; what looks at it now is the machinery that is about to fetch it
        if self._disable_adapters and self.merged_adapters:
            owner, owners_parameter = self._tied.get(parameter, (self, parameter))
            return kept_bias(owner.base_layer, owners_parameter)
        deltas = self._deltas(parameter)
        names = [name for name in self.adapters_in_use if name in deltas]
        if not names:
            return base
        if self._tape is not None:
            return self._read_per_example(self._tape, parameter, base, names)
        return self._sum(parameter, base, names)

    def _read_per_example(self, tape: Any, parameter: str, base: torch.Tensor | None, names: Sequence[str]) -> Any:
        """The bias without a gradient, which is taken at the layer's output; of a vector, one row per example."""
        if not self._own_forward:
            raise UnsupportedLayerError(
                f"The `{parameter}` of a {stock_class(self.base_layer).__name__} layer is read by other code than the "
                "layer's own forward, so its gradient has no part per example, and it cannot be trained privately. "
                "Leave it out with `exclude_modules`."
            )
        with torch.no_grad():
            value = self._sum(parameter, base, names)
        return value if parameter == "bias" else tape.vector(self, parameter, value)

    # --- adapters ---

    def update_layer(
        self,
        adapter_name: str,
        biases: Sequence[Bias],
        *,
        inference_mode: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Adds an adapter whose deltas, at zero, cover `biases` (the terms of this layer that were selected).

        Args:
            adapter_name (`str`): Name of the new adapter.
            biases (`Sequence[Bias]`): What to tune in this layer. Several terms of one fused vector make one delta.
            inference_mode (`bool`, *optional*, defaults to `False`): Leaves the deltas frozen.
            device (`torch.device`, *optional*): Where the deltas are made; by default, where the layer is.
        """
        for parameter in self.bias_parameters:
            chosen = [bias for bias in biases if bias.parameter == parameter]
            if chosen:
                index = span_index(chosen)
                shape = chosen[0].shape if index is None else (index.numel(),)
                self._deltas(parameter)[adapter_name] = nn.Parameter(
                    torch.zeros(shape, dtype=torch.float32, device=device or self.device_of_base)
                )
                if index is not None:
                    self.register_buffer(index_name(parameter, adapter_name), index.to(self.device_of_base), False)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def share_delta(self, adapter_name: str, parameter: str, owner: BitFitLayer, owners_parameter: str) -> None:
        """Makes an adapter use the delta of `owner`, whose bias is the same Parameter as this layer's."""
        self._deltas(parameter).share(adapter_name, owner._deltas(owners_parameter)[adapter_name])
        index = owner._index(owners_parameter, adapter_name)
        if index is not None:
            self.register_buffer(index_name(parameter, adapter_name), index, False)
        self._tied[parameter] = (owner, owners_parameter)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for parameter in self.bias_parameters:
            self._buffers.pop(index_name(parameter, adapter_name), None)

    def forget(self, adapter_name: str) -> None:
        """Removes an adapter and all that is kept for it; nothing where there is none."""
        for parameter in self.bias_parameters:
            if adapter_name in self._deltas(parameter):
                del self._deltas(parameter)[adapter_name]
            self._buffers.pop(index_name(parameter, adapter_name), None)
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]

    def serves_any(self) -> bool:
        """Whether there is an adapter left."""
        return any(len(self._deltas(parameter)) for parameter in self.bias_parameters)

    def switch_head_along(self, leaves: Sequence[BitFitHead]) -> None:
        """Has the head's leaves switched on and off together with this layer, which is the model's first.

        transformers' `enable_adapters` knows the tuner's layers only and would leave the head switched off. What the
        leaves refuse is refused here, before any layer has been switched.
        """
        self._head = tuple(leaves)  # in a tuple, so that they do not become children of this layer

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's hook: activates adapters, and makes their deltas alone trainable."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for leaf in self._head if len(names) > 1 else ():
            leaf.check_set_adapter(names)
        # As PEFT's own does, without its walk through each parameter's wrappers: a server switches at every request.
        for parameter in self.bias_parameters:
            deltas = self._deltas(parameter)
            for name in deltas:
                delta = deltas[name]
                wanted = name in names and not inference_mode
                if delta.requires_grad != wanted and delta.is_leaf:
                    delta.requires_grad_(wanted)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        for leaf in self._head:
            leaf.enable_adapters(enabled)

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether `adapter_name` tunes anything in this layer."""
        return any(adapter_name in self._deltas(parameter) for parameter in self.bias_parameters)

    def base_bias(self, parameter: str) -> torch.Tensor | None:
        """`b_0` as the base was loaded, also while adapters are merged into it."""
        if parameter in self._tied:
            owner, owners_parameter = self._tied[parameter]
            return owner.base_bias(owners_parameter)
        return base_bias(self.base_layer, parameter)

    @property
    def device_of_base(self) -> torch.device:
        """Where the deltas belong: beside the layer's tensors, or where it computes if they are offloaded."""
        device = next((tensor.device for tensor in self.base_layer.parameters()), torch.device("cpu"))
        offloaded = getattr(getattr(self.base_layer, "_hf_hook", None), "execution_device", None)
        return torch.device(offloaded) if device.type == "meta" and offloaded is not None else device

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype.
        target = self.device_of_base if device is None else device
        for parameter in self.bias_parameters:
            deltas = self._deltas(parameter)
            if adapter_name in deltas and deltas[adapter_name].device.type != "meta":
                deltas[adapter_name].data = deltas[adapter_name].data.to(target)

    # --- merging ---

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes `b_0 + Σ δ` into the base's stored bias, and keeps `b_0` aside for [`~BitFitLayer.unmerge`].

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Refuses a result with NaN or Inf.
            adapter_names (`list[str]`, *optional*): What to merge; the active adapters by default.

        Raises:
            [`MergeError`]: The result is not finite, or the layer has no place for a bias.
        """
        names = self._to_merge(adapter_names)
        for parameter, value in self.merged_biases(names, safe_merge=safe_merge).items():
            if parameter not in self._tied:
                write_over(self.base_layer, parameter, value)
        self.merged_adapters.extend(names)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]

    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises what [`~BitFitLayer.merge`] would raise, and changes nothing."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of adapters that are merged already; `merge` warns of them
            names = self._to_merge(adapter_names)
        self.merged_biases(names, safe_merge=safe_merge)

    @torch.no_grad()
    def merged_biases(self, names: list[str], *, safe_merge: bool = False) -> dict[str, torch.Tensor]:
        """What the biases are when `names` are merged beside those that are merged already."""
        if names and self._adds_to_output:
            raise MergeError(
                f"A {stock_class(self.base_layer).__name__} layer computes without a bias, so the one that "
                "`add_missing_biases=True` gave it cannot be merged. Keep the delta separate."
            )
        merged = {}
        for parameter in self.bias_parameters:
            present = [name for name in [*self.merged_adapters, *names] if name in self._deltas(parameter)]
            if not names or not present:
                continue
            merged[parameter] = self._sum(parameter, self.base_bias(parameter), present)
            if safe_merge and not torch.isfinite(merged[parameter]).all():
                raise MergeError(
                    f"Merging {present} gives NaN or Inf in the `{parameter}` of a "
                    f"{stock_class(self.base_layer).__name__} layer; the adapter seems to be broken."
                )
        return merged

    def unmerge(self) -> None:
        """Puts back the stored bias that the base had before merging, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for parameter in self.bias_parameters:
            put_back(self.base_layer, parameter)
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's hook for taking the layer out of the model: returns the stock layer, merged if asked for."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            for parameter in self.bias_parameters:
                forget(self.base_layer, parameter)
        elif self.merged:
            self.unmerge()
        uninstall(self.base_layer, self.bias_parameters)
        return self.base_layer

    # --- the rest of the model sees the stock layer ---

    @property
    def in_features(self) -> int | None:
        """Size of the layer's input, which PEFT's tools read of every layer; `None` where its kind says none."""
        return features(self.base_layer)[0]

    @property
    def out_features(self) -> int | None:
        """Size of the layer's output, or `None`."""
        return features(self.base_layer)[1]

    def train(self, mode: bool = True) -> BitFitLayer:
        """Sets the mode; a BatchNorm's running statistics are frozen weights, so it stays in evaluation mode."""
        super().train(mode)
        if isinstance(self.base_layer, nn.modules.batchnorm._BatchNorm):
            self.base_layer.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of the layers they own, such as the stride of a convolution.
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A layer's own `__deepcopy__` would copy the layer and leave this wrapper out.
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)
