"""The BitFit paper's random baselines: as many parameters as BitFit, but any."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitfit_hf.terms import find_biases

from .base import Folder, Method, body_parameters, train_head_only
from .sparse import SparseValues, load_sparse, parametrizations, parametrize_, save_sparse


class _RandomSubset(Method):
    """Trains scalars of the body drawn by the seed, and the head.

    Args:
        budget (`int`, *optional*): How many; as many as BitFit trains on the model by default.
        seed (`int`, *optional*, defaults to 0): Which.
    """

    learning_rates = (1e-4, 4e-4, 7e-4, 1e-3)

    def __init__(self, budget: int | None = None, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if budget is not None and budget < 1:
            raise ValueError(f"budget={budget} is no number of parameters to train: pass 1 or more, or None.")
        self.budget = budget

    def _prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        budget = self.budget or sum(bias.num_parameters for bias in find_biases(model))
        if not budget:
            raise ValueError(
                f"{type(model).__name__} has no biases, so there is no number of parameters to take over from BitFit. "
                f"Say how many to train: make_method({self.name!r}, budget=...)."
            )
        drawn = self._draw(model, budget, np.random.default_rng(self.seed))
        train_head_only(model)
        parametrize_(model, {name: SparseValues(model.get_parameter(name), at) for name, at in drawn.items()})
        return model

    @abstractmethod
    def _draw(self, model: PreTrainedModel, budget: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Flat indices of what to train, sorted, by name of the parameter."""

    def save(self, model: nn.Module, folder: Folder) -> int:
        values = {name: (chosen.indices, chosen.values) for name, _, chosen in parametrizations(model, SparseValues)}
        return save_sparse(values, model, folder)

    def load(self, model: PreTrainedModel, folder: Folder) -> PreTrainedModel:
        load_sparse(model, folder)
        return model


class RandUniform(_RandomSubset):
    """
    Trains scalars drawn from all of the body, each with the same chance.

    Exactly as many as BitFit has, without replacement. The reference code gives every tensor its share, rounded down,
    of a round number (100,000 for BERT-base) and draws with replacement, which trains somewhat fewer.

    Args:
        budget (`int`, *optional*): How many; as many as BitFit trains on the model by default.
        seed (`int`, *optional*, defaults to 0): Which.
    """

    name = "rand_uniform"

    def _draw(self, model: PreTrainedModel, budget: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        body = body_parameters(model)
        ends = np.cumsum([parameter.numel() for parameter in body.values()])
        if budget > ends[-1]:
            raise ValueError(f"budget={budget} is more than the {ends[-1]} parameters of the model without its head.")
        drawn = np.sort(rng.choice(ends[-1], size=budget, replace=False, shuffle=False))
        parts = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
        starts = [0, *ends[:-1]]
        return {name: torch.from_numpy(part - start) for name, part, start in zip(body, parts, starts) if len(part)}


class RandRowCol(_RandomSubset):
    """
    Trains whole rows and columns of matrices drawn by the seed.

    Like the reference code: each matrix with a bias gives as many of its weights as its bias has, `out` of
    `W: out × in`. That is one column or, with equal chances and only where `in` divides `out`, `out / in` rows (the
    reference rounds down and draws with replacement there). A norm gives its weight vector, which is as long as its
    bias. So the count is BitFit's exactly, wherever each bias has such a weight beside it: the embeddings' norm counts
    here, which the reference leaves out.

    For another budget the modules are gone through in random order, again and again, each adding once more as many
    rows or columns if they still fit: the count stays below the budget by less than the smallest such addition.

    Args:
        budget (`int`, *optional*): How many parameters; as many as BitFit trains on the model by default.
        seed (`int`, *optional*, defaults to 0): Which.
    """

    name = "rand_row_col"

    def _draw(self, model: PreTrainedModel, budget: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        stocks = {name: _Lines.of(model, name, rng) for name in _weights_with_bias(model)}
        names = list(stocks)
        rng.shuffle(names)
        drawn: dict[str, list[np.ndarray]] = defaultdict(list)
        left, added = budget, True
        while added:
            added = False
            for name in names:
                if stocks[name].helpings and stocks[name].size <= left:
                    drawn[name].append(stocks[name].take())
                    left -= drawn[name][-1].size
                    added = True
        if not drawn:
            raise ValueError(
                f"No row or column of a matrix with a bias fits a budget of {budget} parameters in "
                f"{type(model).__name__}. Pass a larger budget, or use rand_uniform."
            )
        return {name: torch.from_numpy(np.sort(np.concatenate(parts))) for name, parts in drawn.items()}


def _weights_with_bias(model: PreTrainedModel) -> list[str]:
    """Names of the weights that stand beside a bias, outside the head; a shared one once."""
    body = {id(parameter): name for name, parameter in body_parameters(model).items()}
    weights = [model.get_submodule(bias.module)._parameters.get("weight") for bias in find_biases(model)]
    return list(dict.fromkeys(body[id(weight)] for weight in weights if id(weight) in body))


@dataclass
class _Lines:
    """The rows or the columns of one weight, cut into disjoint helpings as large as the bias beside it.

    Args:
        shape (`tuple[int, int]`): Of the weight as it is stored.
        axis (`int`): Along which the lines are counted: 0 for the rows of what is stored, 1 for its columns.
        helpings (`list[np.ndarray]`): Numbers of the lines of each, in random order.
    """

    shape: tuple[int, int]
    axis: int
    helpings: list[np.ndarray]

    @classmethod
    def of(cls, model: PreTrainedModel, name: str, rng: np.random.Generator) -> _Lines:
        weight = model.get_parameter(name)
        if weight.dim() == 1:  # of a norm: one line
            return cls((1, weight.numel()), 0, [np.array([0])])
        shape = weight.shape[0], weight.numel() // weight.shape[0]
        # GPT-2's Conv1D stores W as in × out.
        out_axis = 1 if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else 0
        outputs, inputs = shape[out_axis], shape[1 - out_axis]
        rows = outputs % inputs == 0 and bool(rng.integers(2))
        axis, lines, each = (out_axis, outputs, outputs // inputs) if rows else (1 - out_axis, inputs, 1)
        return cls(shape, axis, list(rng.permutation(lines).reshape(-1, each)))

    @property
    def size(self) -> int:
        """Scalars in a helping."""
        return self.helpings[-1].size * self.shape[1 - self.axis] if self.helpings else 0

    def take(self) -> np.ndarray:
        """Flat indices of the scalars of one more helping."""
        lines, across = self.helpings.pop(), np.arange(self.shape[1 - self.axis])
        rows, columns = (lines[:, None], across) if self.axis == 0 else (across[:, None], lines)
        return (rows * self.shape[1] + columns).ravel()
