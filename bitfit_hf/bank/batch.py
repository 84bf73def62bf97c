"""What is known while one mixed batch runs: which example belongs to which task.

It travels in a context variable, so nothing of it lies in the modules that all threads share, and a layer that is run
by somebody else's code finds none and computes what the stock layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ..errors import TaskBankError
from ..tuner.nested import rows_per_example


class BatchTask:
    """One of the distinct tasks of a batch.

    Args:
        examples (`Sequence[int]`): Its places in the batch, ascending.
        rows (`Sequence[int]`): Its row in the table of each site; zeros for the base itself.
        head (`Mapping[str, nn.Module]`, *optional*): Its head's leaf modules by path.
        rows_tensor (`torch.Tensor`, *optional*): The rows as a tensor, where there is one: making it takes longer than
            a small layer.
    """

    def __init__(
        self,
        examples: Sequence[int],
        rows: Sequence[int],
        head: Mapping[str, nn.Module] | None = None,
        rows_tensor: torch.Tensor | None = None,
    ) -> None:
        self.examples = list(examples)
        self.rows = rows
        self.head = head or {}
        self._rows_tensor = rows_tensor
        self._index: dict[torch.device, torch.Tensor] = {}

    @property
    def rows_tensor(self) -> torch.Tensor:
        """Its rows as a tensor."""
        return torch.tensor(self.rows) if self._rows_tensor is None else self._rows_tensor

    def index(self, device: torch.device) -> torch.Tensor:
        """Its places as a tensor."""
        if device not in self._index:
            self._index[device] = torch.tensor(self.examples, device=device)
        return self._index[device]


class Batch:
    """One request to the bank.

    Args:
        tasks (`Sequence[BatchTask]`): Its tasks; together they cover every example once.
        size (`int`): Number of examples.

    Attributes:
        only_task ([`BatchTask`], *optional*): While set, everything is computed with this task's deltas.
        tuned (`list[bool]`): For each site, whether some task of a mixed batch tunes it.
        inside (`object`, *optional*): The layer whose own code is running, which may read its stored bias.
        answering (`Sequence[BatchTask]`): The tasks whose head is running.
        shared (`dict`, *optional*): What modules of the base have computed for this batch, where several task models
            share them, see [`bitfit_hf.bank.intercept`].
        by_layers (`bool`): Whether the base's own layers compute it, whatever the bank's engine.
        read_outside (`set`, *optional*): In a trial run, collects the layers whose bias other code than their own
            reads.
    """

    def __init__(self, tasks: Sequence[BatchTask], size: int) -> None:
        self.tasks = tasks
        self.size = size
        # Where all examples are of one task there is nothing to mix.
        self.only_task: BatchTask | None = tasks[0] if len(tasks) == 1 else None
        self.tuned: list[bool] = []
        self.inside: object | None = None
        self.answering: Sequence[BatchTask] = ()
        self.shared: dict[nn.Module, list[tuple[Any, Any]]] | None = None
        self.by_layers = False
        self.read_outside: set[object] | None = None
        self._rows: dict[tuple[int, torch.device], tuple[torch.Tensor, ...]] = {}
        if len(tasks) > 1:
            table = torch.stack([task.rows_tensor for task in tasks])
            self.tuned = table.amax(dim=0).bool().tolist()
            self._table = table[torch.tensor(self.owners(tasks))].t().contiguous()  # (sites, examples)

    def owners(self, tasks: Sequence[BatchTask]) -> list[int]:
        """For each example the place of its task in `tasks`; 0 where it is of none of these."""
        places = [0] * self.size
        for place, task in enumerate(tasks):
            for example in task.examples:
                places[example] = place
        return places

    def rows_each(self, rows: int, what: str) -> int:
        """How many of the rows that a module computes are one example's.

        Args:
            rows (`int`): The length of the batch dimension.
            what (`str`): Names the module, for the message.

        Raises:
            [`TaskBankError`]: They cannot be shared out evenly.
        """
        each = rows_per_example(rows, self.size)
        if each is None:
            raise TaskBankError(
                f"{what} computes {rows} rows for a batch of {self.size} examples, so it is not known which belong to "
                "which. Ask for one task per call."
            )
        return each

    def table_rows(self, site: int, device: torch.device, each: int = 1) -> torch.Tensor:
        """The row in the table of a site of each of `examples * each` rows, the example outermost."""
        found = self._rows.get((each, device))
        if found is None:
            found = self._table.to(device).repeat_interleave(each, dim=1).unbind()
            self._rows[each, device] = found
        return found[site]

    def rows_of(self, sites: Sequence[int], each: int) -> torch.Tensor:
        """As [`~Batch.table_rows`] for several sites, `(sites, examples * each)`, of a batch of one task too."""
        if self.only_task is not None:
            rows = self.only_task.rows_tensor[list(sites), None]
            return rows.expand(-1, self.size * each).contiguous()
        return self._table[list(sites)].repeat_interleave(each, dim=1)

    def run_only(self, task: BatchTask, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a module with one task's deltas."""
        before, self.only_task = self.only_task, task
        try:
            return forward(*args, **kwargs)
        finally:
            self.only_task = before

    def run_inside(self, layer: object, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a layer's own code, which may read the layer's stored bias."""
        before, self.inside = self.inside, layer
        try:
            return forward(*args, **kwargs)
        finally:
            self.inside = before


_current: ContextVar[Batch | None] = ContextVar("bitfit_bank_batch", default=None)


# The batch that this thread is running, if any. The method itself: every layer calls it.
current = _current.get


@contextmanager
def running(batch: Batch) -> Iterator[Batch]:
    """Makes `batch` the current one inside the block."""
    token = _current.set(batch)
    try:
        yield batch
    finally:
        _current.reset(token)
