"""LoRA (Hu et al., 2022), as PEFT has it."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitfit_hf.terms import find_biases, head_modules
from bitfit_hf.terms.structure import LINEAR, kind_of

from .base import Folder, Method, size_of


class Lora(Method):
    """
    Adds a product of two thin matrices to the query and value projections, `W + (alpha / r) B A`; B starts at zero.

    Rank, scale and projections are those of the LoRA paper's GLUE experiments (Hu et al., 2022, Table 9), and the grid
    spans the rates found there, 2e-4 to 5e-4. The head is trained whole (PEFT's `modules_to_save`).

    Args:
        r (`int`, *optional*, defaults to 8): Rank.
        alpha (`int`, *optional*, defaults to 16): Scale of the product.
        dropout (`float`, *optional*, defaults to 0.1): Of the product's input.
        seed (`int`, *optional*, defaults to 0): For A.
    """

    name = "lora"
    learning_rates = (1e-4, 2e-4, 5e-4, 1e-3)

    def __init__(self, r: int = 8, *, alpha: int = 16, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.r, self.alpha, self.dropout = r, alpha, dropout

    def _prepare(self, model: PreTrainedModel) -> PeftModel:
        targets = query_and_value(model)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
            modules_to_save=head_modules(model) or None,
        )
        return get_peft_model(model, config)

    def save(self, model: nn.Module, folder: Folder) -> int:
        assert isinstance(model, PeftModel)
        model.save_pretrained(str(folder))
        return size_of(folder, ["adapter_config.json", "adapter_model.safetensors"])

    def load(self, model: PreTrainedModel, folder: Folder) -> PeftModel:
        return PeftModel.from_pretrained(model, str(folder))


def query_and_value(model: PreTrainedModel) -> list[str]:
    """Paths of the query and value projections of any architecture; where the key is fused with them, it comes along.

    Raises:
        `ValueError`: The model has none.
    """
    linear = {
        bias.module: bias.term
        for term in ("key", "query", "value")
        for bias in find_biases(model, add_missing_biases=True)
        if bias.term == term and kind_of(model.get_submodule(bias.module)) == LINEAR
    }
    # In DeBERTa the biases of query and value stand apart from the projection, to which only the key's is left.
    found = [path for path, term in linear.items() if term != "key"] or list(linear)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear query or value projection that bitfit_hf.terms knows, so there is "
            "no place for LoRA. `bitfit inspect` lists the terms of a model."
        )
    return found
