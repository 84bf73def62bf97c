"""[`Engine`]: computes the backbone of a bank for a mixed batch, where the base's own layers are not to do it.

By default a bank's base computes with its own layers, each of which adds its examples' deltas
([`bitfit_hf.bank.layers`]). An engine takes the place of the whole backbone: it gets the inputs, the tables of
`b_0 + δ`, and for each bias which row of its table is which example's. Tasks, tables, heads and all that is in front
of and behind the backbone stay the same, so a bank answers alike whatever runs it.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..errors import TaskBankError
from .batch import Batch
from .intercept import intercept, named_arguments
from .sites import Site

# What some tokenizers give for models that make no difference between a first and a second text.
_NO_MATTER = "token_type_ids"


class Engine(ABC):
    """Runs a backbone with the biases of each example.

    Attributes:
        biases (`Sequence[str]`): Stock names, in the backbone, of those that it computes with.
        inputs (`Sequence[str]`): The arguments of the backbone's forward that it takes.
        tolerance (`float`): How far its answers may be from the base's own, as a share of what random deltas change.
        coarse (`bool`): Whether it rounds so much that this is a share of the answers themselves instead.
    """

    biases: Sequence[str]
    inputs: Sequence[str]
    tolerance: float
    coarse: bool = False

    @abstractmethod
    def run(
        self, inputs: Mapping[str, torch.Tensor], tables: Sequence[torch.Tensor], rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            inputs (`Mapping[str, torch.Tensor]`): Each of `inputs`, `(batch, length)`, integers.
            tables (`Sequence[torch.Tensor]`): For each of `biases`, `b_0 + δ` of all tasks, `(tasks, width)`, float32.
            rows (`torch.Tensor`): `(batch, biases)`: each example's row in each table.

        Returns:
            `dict[str, torch.Tensor]`: `last_hidden_state`, and `pooler_output` where the backbone has a pooler.
        """

    @abstractmethod
    def mismatch(self, error: float) -> Exception:
        """What to raise where its answers are further from the base's than they may be.

        Args:
            error (`float`): How far, in the unit of `tolerance`.
        """


def run_by_engine(backbone: nn.Module, engine: Engine, sites: Sequence[Site]) -> None:
    """Has an engine compute a backbone for mixed batches.

    Args:
        backbone (`nn.Module`): Of the bank's own copy of the base.
        engine ([`Engine`]): The engine.
        sites (`Sequence[Site]`): The site of each of its biases. From now on they hold `b_0 + δ`.
    """
    signature = inspect.signature(type(backbone).forward)
    numbers = [site.number for site in sites]

    def run(batch: Batch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if batch.by_layers:
            return forward(*args, **kwargs)
        inputs = _inputs(engine, named_arguments(signature, args, kwargs))
        examples = len(inputs["input_ids"])
        each = batch.rows_each(examples, type(backbone).__name__)
        outputs = engine.run(inputs, [site.table for site in sites], batch.rows_of(numbers, each).t())
        return BaseModelOutputWithPooling(**outputs)  # type: ignore[arg-type]

    intercept(backbone, run)


def run_with_own_pooler(shell: Any, backbone: nn.Module) -> None:
    """Has a backbone whose pooler belongs to the head run the base's backbone, and then its own pooler.

    Args:
        shell (`nn.Module`): The backbone of a task model, with the head's pooler in it.
        backbone (`nn.Module`): The base's, which an engine computes.
    """

    def run(batch: Batch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = backbone(*args, **kwargs)
        # Another object: the base's answer is shared by all task models of the batch.
        pooled = shell.pooler(output.last_hidden_state)
        return BaseModelOutputWithPooling(last_hidden_state=output.last_hidden_state, pooler_output=pooled)

    intercept(shell, run)


def _inputs(engine: Engine, named: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments of a call, as an engine takes them."""
    unknown = [name for name in named if name not in engine.inputs and name != _NO_MATTER]
    if unknown or not isinstance(named.get("input_ids"), torch.Tensor):
        raise TaskBankError(
            f"This bank's engine takes {', '.join(engine.inputs)}, and the call has {', '.join(map(repr, named))}. "
            'Leave the rest out, or make the bank with `engine="torch"`, which takes all that the model takes.'
        )
    ids = named["input_ids"]
    fill: dict[str, Callable[..., torch.Tensor]] = {"attention_mask": torch.ones_like, _NO_MATTER: torch.zeros_like}
    return {name: named[name] if name in named else fill[name](ids) for name in engine.inputs}
