"""[`HeadParameter`]: a parameter of the task head that lies in no module, trained whole, one copy per adapter."""

from __future__ import annotations

import torch
from torch import nn

from ..backends.sharded import gathered, is_sharded, lent
from ..errors import UnsupportedLayerError
from ..storage.keys import VALUE
from ..terms.structure import HOLDER
from .head import BitFitHead
from .reading import install, stock_class, uninstall


class HeadParameter(BitFitHead):
    """
    Stands beside a parameter of the head that the model reads itself, and lets it read the active adapter's copy.

    There is no module that could be wrapped: a Wav2Vec2 model holds its `layer_weights` itself. So the model's class
    gains a property of that name, as tuned layers do for their bias (see [`bitfit_hf.tuner.reading`]). The copies are
    float32 and are read in the dtype of the stock parameter, which stays where it is. To PEFT and transformers this is
    one more module of the head.

    Args:
        owner (`nn.Module`): Holds the parameter.
        parameter (`str`): Its name there.
        adapter_name (`str`): The first adapter that has a copy of it.
    """

    def __init__(self, owner: nn.Module, parameter: str, adapter_name: str) -> None:
        self._place = (owner, parameter)  # in a tuple, so that the owner is no child of its own child
        super().__init__(nn.Module(), adapter_name)
        install(owner, (parameter,), owner=self)

    @property
    def stock(self) -> nn.Parameter:
        """The model's own parameter."""
        owner, parameter = self._place
        return owner._parameters[parameter]  # type: ignore[return-value]

    @property
    def device_of_base(self) -> torch.device:
        """Where the model's own parameter is."""
        return self.stock.device

    def _new_copy(self, num_labels: int | None) -> nn.Module:
        self.stock.requires_grad_(False)
        copy = nn.Module()
        value = gathered(self.stock).detach().to(torch.float32, copy=True)
        copy.register_parameter(VALUE, nn.Parameter(value, requires_grad=False))
        return copy

    def effective_bias(self, parameter: str, base: torch.Tensor | None) -> torch.Tensor | None:
        """What the model reads: the active adapter's copy, in the dtype of the stock parameter `base`."""
        if self._mixed is not None:
            raise UnsupportedLayerError(
                f"The head's `{parameter}` is read by a {stock_class(self._place[0]).__name__} as a whole, so "
                "`adapter_names` cannot be applied per example. Run one batch per adapter, or use "
                "`bitfit_hf.TaskBank`."
            )
        if base is not None and (base.is_meta or is_sharded(base)):
            return base  # what looks at it now is the machinery that is about to fetch it
        name = None if self.disable_adapters else next(iter(self.active_adapters), None)
        if name is None or name not in self.modules_to_save:
            return base
        value = lent(getattr(self.modules_to_save[name], VALUE), self._place[0])
        return value if base is None else value.to(base.dtype)

    def is_weight(self, parameter: nn.Parameter) -> bool:
        """Whether weight decay is for it. That is known by its name alone, which the Trainer goes by too."""
        return "bias" not in self._place[1]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's hook: leaves the tuned value behind when merging, else the model's own."""
        owner, parameter = self._place
        stock = self.stock
        names = self.active_adapters if adapter_names is None else [n for n in adapter_names if n in self._adapters]
        uninstall(owner, (parameter,))
        if merge and names and names[0] in self.modules_to_save:
            value = getattr(self.modules_to_save[names[0]], VALUE)
            owner._parameters[parameter] = nn.Parameter(value.detach().to(stock, copy=True), requires_grad=False)
        return super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)

    def live_path(self, path: str) -> str:
        """Where the copies are: beside the parameter, whose path is `path`."""
        parent, _, name = path.rpartition(".")
        return f"{parent}.{HOLDER}{name}" if parent else HOLDER + name
