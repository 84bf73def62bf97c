"""Parameters of a task's head that lie in no module, and how a shell comes to read them."""

from __future__ import annotations

import torch
from torch import nn

from .batch import current


class HeadValue(nn.Module):
    """A parameter of the head that lies in no module, as one task has it.

    Args:
        value (`torch.Tensor`): Of the parameter's shape.
    """

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=False)


class BankedValue:
    """Lets a shell read a [`HeadValue`] of the one task that its head is being run for.

    The shell reads such a parameter as a whole, so it cannot be another one for each example of a batch; a kind that
    has some is run for one task at a time.

    Args:
        path (`str`): The parameter's name in the task's class.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def effective_bias(self, parameter: str, base: torch.Tensor | None) -> torch.Tensor | None:
        """What the shell reads, in the dtype of the base."""
        batch = current()
        if batch is None or base is None:
            return base
        (member,) = batch.answering
        assert member.resident is not None
        value = member.resident.heads[self.path].value
        assert isinstance(value, torch.Tensor)
        return value.to(base.dtype)
