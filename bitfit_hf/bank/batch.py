"""What is known while one mixed batch runs: which example belongs to which task.

It travels in a context variable, so nothing of it lies in the modules that all threads share, and a layer that is run
by somebody else's code finds none and computes what the stock layer computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .residents import Resident


class Member:
    """One of the distinct tasks of a batch.

    Args:
        examples (`Sequence[int]`): Its places in the batch, ascending.
        rows (`Sequence[int]`): Its row in the table of each site; zeros for the base itself.
        resident ([`Resident`], *optional*): The task in memory; `None` for the base.
    """

    def __init__(self, examples: Sequence[int], rows: Sequence[int], resident: Resident | None = None) -> None:
        self.examples = list(examples)
        self.rows = rows
        self.resident = resident
        self._index: dict[torch.device, torch.Tensor] = {}

    @property
    def rows_tensor(self) -> torch.Tensor:
        """Its rows as a tensor, which a resident keeps: making one takes longer than a small layer."""
        return torch.tensor(list(self.rows)) if self.resident is None else self.resident.rows_tensor

    def index(self, device: torch.device) -> torch.Tensor:
        """Its places as a tensor."""
        if device not in self._index:
            self._index[device] = torch.tensor(self.examples, device=device)
        return self._index[device]


class Batch:
    """One request to the bank.

    Args:
        members (`Sequence[Member]`): Its tasks; together they cover every example once.
        size (`int`): Number of examples.

    Attributes:
        alone ([`Member`], *optional*): While set, everything is computed with this task's deltas.
        within (`object`, *optional*): The layer whose own code is running, which may read its stored bias.
        answering (`Sequence[Member]`): The tasks whose head is running.
        results (`dict`, *optional*): What parts of the base have computed for this batch, where several task classes
            share them, see [`bitfit_hf.bank.parts`].
        active (`list[bool]`): For each site, whether some task of a mixed batch tunes it.
        strangers (`set`, *optional*): In a trial run, collects the layers whose bias is read by other code.
    """

    def __init__(self, members: Sequence[Member], size: int) -> None:
        self.members = members
        self.size = size
        # Where all examples are of one task there is nothing to mix.
        self.alone: Member | None = members[0] if len(members) == 1 else None
        self.within: object | None = None
        self.answering: Sequence[Member] = ()
        self.results: dict[int, list[tuple[Any, Any]]] | None = None
        self.strangers: set[object] | None = None
        self.active: list[bool] = []
        self._rows: dict[tuple[int, torch.device], tuple[torch.Tensor, ...]] = {}
        self._folded: dict[tuple[int, torch.device], torch.Tensor] = {}
        if len(members) > 1:
            self._gather()

    def _gather(self) -> None:
        table = torch.stack([member.rows_tensor for member in self.members])
        owners = torch.tensor(self.owners(self.members))
        self.active = table.amax(dim=0).bool().tolist()
        self._matrix = table[owners].t().contiguous()  # (sites, examples)

    def owners(self, members: Sequence[Member]) -> list[int]:
        """For each example the place of its task in `members`; 0 where it is of none of these."""
        places = [0] * self.size
        for place, member in enumerate(members):
            for example in member.examples:
                places[example] = place
        return places

    def folded(self, factor: int, device: torch.device) -> torch.Tensor:
        """The example that each of `examples * factor` rows belongs to, the example outermost."""
        found = self._folded.get((factor, device))
        if found is None:
            found = torch.arange(self.size, device=device).repeat_interleave(factor)
            self._folded[factor, device] = found
        return found

    def rows(self, site: int, device: torch.device, factor: int = 1) -> torch.Tensor:
        """The row in the table of a site of each of `examples * factor` rows, the example outermost."""
        found = self._rows.get((factor, device))
        if found is None:
            found = self._matrix.to(device).repeat_interleave(factor, dim=1).unbind()
            self._rows[factor, device] = found
        return found[site]

    @contextmanager
    def only(self, member: Member) -> Iterator[None]:
        """Computes with one task's deltas inside the block."""
        before, self.alone = self.alone, member
        try:
            yield
        finally:
            self.alone = before

    def call_within(self, layer: object, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs a layer's own code, which may read the layer's stored bias."""
        before, self.within = self.within, layer
        try:
            return forward(*args, **kwargs)
        finally:
            self.within = before


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
