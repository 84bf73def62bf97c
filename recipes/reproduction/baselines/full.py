"""Full fine-tuning, and the other extreme: a frozen body under a trained head."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .base import (
    Folder,
    Method,
    StoredWhole,
    head_parameters,
    size_of,
    train_head_only,
)


class Full(Method):
    """Trains every parameter. A task costs a copy of the model, saved as a stock checkpoint.

    The grid of rates is the BitFit paper's for full fine-tuning.
    """

    name = "full"
    learning_rates = (1e-5, 2e-5, 3e-5, 5e-5)

    def _prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.requires_grad_(True)

    def save(self, model: nn.Module, folder: Folder) -> int:
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(folder)
        return size_of(folder, ["config.json", "generation_config.json", "model*.safetensors", "model*.index.json"])

    def load(self, model: PreTrainedModel, folder: Folder) -> PreTrainedModel:
        trained = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(trained.state_dict())
        return model


class Frozen(StoredWhole):
    """Trains the task head alone, on top of the pre-trained body as it is.

    The reference code trains it with BitFit's settings, so the grid of rates is BitFit's. The body keeps its dropout.
    """

    name = "frozen"
    learning_rates = (1e-4, 4e-4, 7e-4, 1e-3)

    _FILE = "head.safetensors"

    def _prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        if not head_parameters(model):
            raise ValueError(
                f"{type(model).__name__} has no new task head, so with a frozen body nothing would be trained. Use "
                "another method for language models."
            )
        train_head_only(model)
        return model
