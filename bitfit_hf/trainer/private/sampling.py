"""Poisson batches: every example takes part in every update, independently, with the same probability."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils.data import Sampler

from ...errors import PrivacyError
from .gradients import secure_uniform

EMPTY = "bitfit_empty_batch"

# A state of torch's Mersenne twister on the CPU, in words of 8 bytes: 3 of bookkeeping, then 624 of 32 random bits.
_STATE_BYTES, _FIRST, _WORDS = 5056, 3, 624


def keyed_generator(key: bytes, *purpose: bytes) -> torch.Generator:
    """A torch generator on the CPU, always the same for one purpose, whose whole state is made of a secret key.

    `manual_seed` takes in 32 bits of its seed, and so many seeds can be tried out by who holds a noised gradient
    against them.

    Args:
        key (`bytes`): The secret.
        purpose (`bytes`): What the numbers are for.
    """
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    if state.numel() != _STATE_BYTES:
        raise RuntimeError(f"torch {torch.__version__} keeps {state.numel()} bytes of state, not {_STATE_BYTES}.")
    seed = key + b"".join(hashlib.sha256(part).digest() for part in purpose)
    words = torch.frombuffer(bytearray(hashlib.shake_256(seed).digest(4 * _WORDS)), dtype=torch.int32)
    state.view(torch.int64)[_FIRST : _FIRST + _WORDS] = words.long() & 0xFFFFFFFF
    generator.set_state(state)
    return generator


def draw(examples: int, sample_rate: float, generator: torch.Generator | None) -> list[int]:
    """The examples of an update: by Opacus' sampler, or by the operating system's generator where none is given.

    Args:
        examples (`int`): Size of the data set.
        sample_rate (`float`): Probability with which an example takes part.
        generator (`torch.Generator`, *optional*): On the CPU.
    """
    if generator is None:  # Opacus' sampler takes torch's generators only
        return (secure_uniform(examples) <= sample_rate).nonzero().flatten().tolist()
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    (drawn,) = UniformWithReplacementSampler(
        num_samples=examples, sample_rate=sample_rate, generator=generator, steps=1
    )
    return drawn


class PoissonBatches(Sampler[list[int]]):
    """
    The batches of an epoch, as one process computes them: of what is drawn for an update, every example is one
    process's, by its number. A process cuts its examples into `parts` of nearly one size, one for each forward pass
    of gradient accumulation. Any part may be empty.

    Args:
        sample_rate (`float`): Probability with which an example is in the batch of an update.
        parts (`int`): Forward passes per update.
        draw (`Callable`): Draws the examples of the next update, of all processes.
        process (`int`, *optional*, defaults to 0): This process's number.
        processes (`int`, *optional*, defaults to 1): How many there are.
        lengths (`Sequence[int]`, *optional*): Of all examples. With them a part holds examples of like length: which
            examples an update sums over is settled by then, and their sum does not depend on the parts.
    """

    def __init__(
        self,
        sample_rate: float,
        parts: int,
        draw: Callable[[], list[int]],
        *,
        process: int = 0,
        processes: int = 1,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.parts = parts
        self.updates = max(1, int(1 / sample_rate + 1e-9))
        self._draw = draw
        self._process, self._processes = process, processes
        self._lengths = lengths

    def __len__(self) -> int:
        return self.updates * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.updates):
            own = [example for example in self._draw() if example % self._processes == self._process]
            if self._lengths is not None:
                own.sort(key=self._lengths.__getitem__, reverse=True)
            ends = [len(own) * part // self.parts for part in range(self.parts + 1)]
            for start, end in pairwise(ends):
                yield own[start:end]


_TRIED = 16  # examples of the first batch that are collated alone


class CollateOrEmpty:
    """Collates a batch into one row per example, and marks an empty one, which collators cannot make.

    Args:
        collate (`Callable`): The collator.
        name (`str`): What errors call it.

    Attributes:
        alone (`tuple[int, Any]`, *optional*): Of the first batch with two examples or more, the place of a short one,
            and what the collator makes of it alone.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any], name: str) -> None:
        self._collate, self._name = collate, name
        self.alone: tuple[int, Any] | None = None

    def __call__(self, examples: Sequence[Any]) -> Any:
        if not len(examples):
            return {EMPTY: torch.zeros(0)}
        if self.alone is None and len(examples) > 1:
            with torch.random.fork_rng(devices=()):
                single = [self._collate([copy.deepcopy(example)]) for example in examples[:_TRIED]]
            index = min(range(len(single)), key=lambda i: _numbers(single[i]))
            self.alone = index, single[index]
        batch = self._collate(examples)
        odd = [
            f"{name} {tuple(value.shape)}"
            for name, value in batch.items()
            if isinstance(value, torch.Tensor) and (value.dim() == 0 or value.shape[0] != len(examples))
        ]
        if odd:
            raise PrivacyError(
                f"The collator made {', '.join(odd)} of {len(examples)} examples, which is not one row per example "
                f"({self._name}): an example's gradient cannot be told from another's. Use one that "
                "pads, and packs nothing."
            )
        return batch


def _numbers(batch: Any) -> int:
    return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))
