"""[`Site`]: one bias of the base, and the deltas that the tasks have there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..terms import Bias
from ..terms.base_bias import add_deltas

_FIRST_CAPACITY = 16


class Site:
    """One bias vector of the base with the deltas of all tasks, in one tensor.

    Row 0 of the table is the base, and every task that does not tune this bias: zero, or `b_0` where rows hold it (see
    [`~Site.hold`]). Rows are given to tasks and taken back; a table that is full grows by an eighth, which keeps what
    is reserved near what is used, and its sites do so at different moments, so that no task waits for all of them. A
    row is written while no request uses it, and a grown table has every row where it was, so requests read the table
    without a lock.

    Args:
        number (`int`): Its place among the base's sites.
        biases (`Sequence[Bias]`): The terms that live in the vector.
        dtype (`torch.dtype`): Of the table.
        device (`torch.device`): Of the layer.
        limit (`int`, *optional*): The most tasks there will be.
    """

    def __init__(
        self, number: int, biases: Sequence[Bias], dtype: torch.dtype, device: torch.device, limit: int | None = None
    ) -> None:
        self.number = number
        self.name = biases[0].name
        self.shape = biases[0].shape
        self.exists = biases[0].exists
        self.size = torch.Size(self.shape).numel()
        self.table = torch.zeros((1, self.size), dtype=dtype, device=device)
        self.held: torch.Tensor | None = None
        self._limit = limit
        self._free: list[int] = []
        self._next = 1

    def hold(self, base: torch.Tensor) -> None:
        """From now on a row is `b_0 + δ`, so that whoever needs the effective bias has nothing to add.

        It is the same sum, formed once instead of in each request. Tables of another dtype than float32 stay as they
        are: δ is far smaller than `b_0`, and rounded with it would lose its digits.

        Args:
            base (`torch.Tensor`): `b_0`; a copy is kept.
        """
        if self.table.dtype is not torch.float32:
            return
        assert len(self.table) == 1
        self.held = base.detach().flatten().to(self.table, copy=True)
        self.table[0] = self.held

    # --- rows ---

    def take(self) -> int:
        """Reserves a row."""
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def give_back(self, row: int) -> None:
        """Frees a row."""
        self._free.append(row)

    def write(self, row: int, delta: torch.Tensor, index: torch.Tensor | None) -> None:
        """Writes a task's delta into its row.

        Args:
            row (`int`): From [`~Site.take`].
            delta (`torch.Tensor`): The delta; of `index.numel()` values where `index` is given.
            index (`torch.Tensor`, *optional*): Positions in the flattened vector, where only a part of it is tuned.
        """
        if row >= len(self.table):
            self._grow(row + 1)
        device = self.table.device
        part = (delta.flatten().to(device), None if index is None else index.to(device))
        self.table[row] = add_deltas(self.held, [part], dtype=self.table.dtype, shape=(self.size,))

    def _grow(self, needed: int) -> None:
        first = _FIRST_CAPACITY + self.number % _FIRST_CAPACITY
        capacity = max(needed, len(self.table) + len(self.table) // 8, first)
        if self._limit is not None:
            capacity = max(needed, min(capacity, self._limit + 1))
        # Left uninitialised: rows that no task has are never read, and cost no memory before they are written.
        grown = torch.empty((capacity, self.size), dtype=self.table.dtype, device=self.table.device)
        grown[: len(self.table)] = self.table
        self.table = grown

    # --- the effective bias ---

    def effective(self, row: int, base: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """`b_0 + δ` of one task, formed in float32 or finer and cast once to `dtype`."""
        values = self.table[row].view(self.shape)
        if self.held is not None:
            return values if values.dtype is dtype else values.to(dtype)
        return add_deltas(base, [(values, None)], dtype=dtype)

    def effective_rows(self, rows: torch.Tensor, base: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """`b_0 + δ` of each example, `(examples, size)`, a tensor of its own."""
        if self.held is not None:
            total = self.table.index_select(0, rows)
            return total if total.dtype is dtype else total.to(dtype)
        return add_deltas(base, [(self.delta_rows(rows), None)], dtype=dtype)

    def delta_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """`δ` of each example, `(examples, size)`, float32, a tensor of its own."""
        deltas = self.table.index_select(0, rows)
        if self.held is not None:
            return deltas.sub_(self.held)
        return deltas if deltas.dtype is torch.float32 else deltas.float()

    # --- memory ---

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows that tasks have."""
        return (self._next - 1 - len(self._free)) * self.size * self.table.element_size()

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the table."""
        return self.table.numel() * self.table.element_size()
