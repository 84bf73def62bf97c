"""Training without dropout: what keeps millions of weights from learning by heart is mere noise to their biases."""

from __future__ import annotations

from torch import nn

# Layers keep their rates as modules (`nn.Dropout`) or as numbers, under names such as these: `attention_dropout`,
# `dropout_p`, `attn_drop`, `resid_pdrop`, `drop_prob`, `layerdrop`.
_IN_NAME = "drop"


class WithoutDropout:
    """
    Takes a model's dropout away, until [`~WithoutDropout.remove`].

    The layers are changed and the configuration is not, so what is saved in between does not know of it. A layer that
    reads its rate from the configuration at every step keeps it; in transformers some speech models and GPT-J's
    relatives have such layers.

    Args:
        model (`nn.Module`): Any; its head and its adapters are part of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rates: list[tuple[nn.Module, str, float]] = []
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                names = ["p"]
            else:
                names = [name for name in vars(module) if _IN_NAME in name]
            rates = {name: vars(module)[name] for name in names}
            self._rates += [(module, name, rate) for name, rate in rates.items() if isinstance(rate, float) and rate]
        for module, name, _ in self._rates:
            setattr(module, name, 0.0)

    def remove(self) -> None:
        """Gives each layer its rate back; a second time nothing happens."""
        for module, name, rate in self._rates:
            setattr(module, name, rate)
        self._rates.clear()
