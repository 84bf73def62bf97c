"""BitFit, the paper's way or the library's: the library's own callback, nothing of it done again here."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from bitfit_hf import BiasDelta, BitFitCallback, BitFitConfig, load_delta
from bitfit_hf.trainer.rates import LEARNING_RATE

from .base import Folder, Method, size_of


class BitFit(Method):
    """
    Tunes bias terms and the task head, all at one rate (Ben Zaken, Ravfogel and Goldberg, 2022).

    The preset `"query+intermediate"` is the paper's half-size subset, b_q and b_m2, and has no pooler in it; the
    reference code adds the pooler's bias to every subset, which here is asked for: `"query+intermediate+pooler"`.

    Args:
        terms (`str`, *optional*, defaults to `"all"`):
            Terms of [`BitFitConfig`] or the paper's symbols, joined by `+`: `"query+intermediate"`, `"b_m2"`.
        add_missing_biases (`bool`, *optional*, defaults to `False`): See [`BitFitConfig`].
        seed (`int`, *optional*): Unused: the deltas start at zero.
    """

    learning_rates = (1e-4, 4e-4, 7e-4, 1e-3)
    lr_scale: ClassVar[str] = "uniform"
    dropout: ClassVar[bool] = True

    def __init__(self, terms: str = "all", *, add_missing_biases: bool = False, seed: int = 0) -> None:
        super().__init__(seed=seed)
        names = terms.split("+")
        self.config = BitFitConfig(
            bias_terms=terms if len(names) == 1 else names, add_missing_biases=add_missing_biases
        )
        chosen = self.config.bias_terms
        self.name = (
            "bitfit" if chosen == "all" else f"bitfit:{chosen if isinstance(chosen, str) else '+'.join(chosen)}"
        )

    def _prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        # The callback would inject the deltas when the Trainer is made; like this they can be counted before.
        model.add_adapter(self.config)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        return [BitFitCallback(lr_scale=self.lr_scale, dropout=self.dropout)]

    def save(self, model: nn.Module, folder: Folder) -> int:
        BiasDelta.from_model(model).save_pretrained(folder, card=False)
        return size_of(folder, ["adapter_config.json", "adapter_model.safetensors"])

    def load(self, model: PreTrainedModel, folder: Folder) -> PreTrainedModel:
        load_delta(model, str(folder))
        return model


class BitFitDefault(BitFit):
    """
    BitFit as the library does it when nothing is set: all terms, each at its own multiple of the rate, no dropout.

    There is one rate, and no grid to search: the one that the documentation recommends.

    Args:
        add_missing_biases (`bool`, *optional*, defaults to `False`): See [`BitFitConfig`].
        seed (`int`, *optional*): Unused: the deltas start at zero.
    """

    learning_rates = (LEARNING_RATE, 2 * LEARNING_RATE)  # one of them, by the width of the model
    lr_scale = "default"
    dropout = False

    def __init__(self, *, add_missing_biases: bool = False, seed: int = 0) -> None:
        super().__init__(add_missing_biases=add_missing_biases, seed=seed)
        self.name = "bitfit_default"
