"""Poolers in front of a new head, and which of them were never trained and so carry nothing worth freezing."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict

import torch
from torch import nn

from ..backends.sharded import is_sharded
from .base_bias import base_bias
from .structure import stock_root
from .survey import survey_model

# The classes that classify a sequence or an image as a whole, so their head reads the pooler where there is one. Those
# that classify each token, or point at some, do not, though a few architectures make a pooler for them all the same.
_READS_POOLER = re.compile(
    r"For(SequenceClassification|MultipleChoice|ImageClassification|ImageClassificationWithTeacher"
    r"|VideoClassification|AudioClassification)$"
)


def pooler_modules(model: nn.Module) -> list[str]:
    """The stock paths of the modules of the pooler that stands in front of the head; empty where none does.

    Args:
        model (`torch.nn.Module`): A model, stock or with adapters injected; meta tensors will do.
    """
    return list(_biases(model))


def untrained_pooler(model: nn.Module) -> list[str]:
    """Finds the modules of a pooler in front of the head that no training has touched.

    Initialisation sets biases to exactly zero, and training moves them. A pooler whose biases are all exactly zero was
    never trained: the sentence encoders' are so, since they average the tokens instead, and wherever `from_pretrained`
    found none in the checkpoint. What such a pooler does to a sentence is a random projection.

    Args:
        model (`torch.nn.Module`): A model, stock or with adapters injected, whose class classifies whole sequences.

    Returns:
        `list[str]`: The stock paths of the pooler's modules; empty where there is none in front of the head, where it
            was trained, and where its values cannot be read: on the meta device, and sharded over processes.
    """
    pooler = _biases(model)
    for bias in itertools.chain.from_iterable(pooler.values()):
        if bias is None or bias.is_meta or is_sharded(bias) or bool(bias.detach().any()):
            return []
    return list(pooler)


def _biases(model: nn.Module) -> dict[str, list[torch.Tensor | None]]:
    """`b_0` of the pooler's biases by module."""
    if not any(_READS_POOLER.search(cls.__name__) for cls in type(stock_root(model)).__mro__):
        return {}  # most classes, which need no look at their parameters
    survey = survey_model(model)
    biases: dict[str, list[torch.Tensor | None]] = defaultdict(list)
    for found in survey.found:
        if found.bias.term == "pooler" and found.bias.exists:
            biases[found.bias.module].append(base_bias(survey.modules[found.bias.module], found.bias.parameter))
    return biases
