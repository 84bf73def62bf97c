"""Poisson batches: every example takes part in every update, independently, with the same probability."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

EMPTY = "bitfit_empty_batch"


class PoissonBatches(Sampler[list[int]]):
    """
    The batches of an epoch, drawn by Opacus' sampler. A batch of an update is cut into `parts` of nearly one size, one
    for each forward pass of gradient accumulation; any of them may be empty.

    Args:
        examples (`int`): Size of the data set.
        sample_rate (`float`): Probability with which an example is in the batch of an update.
        parts (`int`): Forward passes per update.
        generator (`Callable`): Gives the generator to draw the next batch with.
    """

    def __init__(
        self, examples: int, sample_rate: float, parts: int, generator: Callable[[], torch.Generator]
    ) -> None:
        self.examples, self.sample_rate, self.parts = examples, sample_rate, parts
        self.updates = max(1, int(1 / sample_rate + 1e-9))
        self._generator = generator

    def __len__(self) -> int:
        return self.updates * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        from opacus.utils.uniform_sampler import UniformWithReplacementSampler

        for _ in range(self.updates):
            (drawn,) = UniformWithReplacementSampler(
                num_samples=self.examples, sample_rate=self.sample_rate, generator=self._generator(), steps=1
            )
            for part in range(self.parts):
                yield drawn[part :: self.parts]


class CollateOrEmpty:
    """Collates a batch, and marks an empty one, which collators cannot make."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, examples: Sequence[Any]) -> Any:
        return self._collate(examples) if len(examples) else {EMPTY: torch.zeros(0)}
