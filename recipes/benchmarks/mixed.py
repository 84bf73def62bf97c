"""Timing batches whose examples are of random tasks, system by system in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Runner = Callable[[dict[str, torch.Tensor], list[str]], Any]


@dataclass(frozen=True)
class Turns:
    """
    What each system took for the same batches.

    Args:
        wall (`dict[str, list[float]]`): Seconds of the clock by system, one for each round.
        processor (`dict[str, list[float]]`): Seconds of this process' processors, likewise.
        distinct (`list[int]`): How many tasks were in the batch of each round, those for warming up included.
    """

    wall: dict[str, list[float]]
    processor: dict[str, list[float]]
    distinct: list[int]


@torch.no_grad()
def time_in_turn(
    runners: Mapping[str, Runner], tasks: int, batch_size: int, length: int, *, rounds: int, warmup: int
) -> Turns:
    """Gives every system the same random batches, in an order that is another for each round.

    Args:
        runners (`Mapping[str, Callable]`): Each takes an encoded batch and the names of its examples' tasks.
        tasks (`int`): There are `task-0` to `task-<tasks - 1>`. The batches are the same for the same number.
        batch_size (`int`): Examples in a batch.
        length (`int`): Tokens of each.
        rounds (`int`): Batches that count.
        warmup (`int`): Batches before them.
    """
    rng = random.Random(tasks)
    turns = Turns({name: [] for name in runners}, {name: [] for name in runners}, [])
    for turn in range(warmup + rounds):
        ids = torch.randint(1000, 20000, (batch_size, length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        names = [f"task-{rng.randrange(tasks)}" for _ in range(batch_size)]
        order = list(runners)
        rng.shuffle(order)
        for name in order:
            start, start_processor = time.perf_counter(), time.process_time()
            runners[name](batch, names)
            if turn >= warmup:
                turns.wall[name].append(time.perf_counter() - start)
                turns.processor[name].append(time.process_time() - start_processor)
        turns.distinct.append(len(set(names)))
    return turns
