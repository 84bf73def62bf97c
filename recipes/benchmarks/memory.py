"""Peak memory of a training step.

On a GPU the allocator knows. On a CPU nothing counts a process's tensors, so each system takes its steps in a process
of its own, and the system's figure for the most memory that the process ever used is read (Linux only). It holds the
weights, gradients, optimizer state, activations and whatever the libraries need while they compute.
"""

from __future__ import annotations

import gc
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .systems import Shape, prepare
from .timing import Stepper

_STEPS = 2  # the optimizer's state is made in the first
_STATUS = Path("/proc/self/status")


def peak_bytes(system: str, shape: Shape, device: torch.device, threads: int) -> int | None:
    """Most memory that a system's step uses, beyond that of the imported libraries; `None` where nothing tells.

    Args:
        system (`str`): Which one.
        shape ([`Shape`]): Of the model.
        device (`torch.device`): Where it computes.
        threads (`int`): Of a process on the CPU.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _take_steps(system, shape, device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _STATUS.exists():
        return None
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit this one's memory
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(_peak_of_this_process, system, shape, threads).result()


def _take_steps(system: str, shape: Shape, device: torch.device) -> None:
    stepper = Stepper(prepare(system, shape, device=device), shape.batch(device))
    for _ in range(_STEPS):
        stepper.step()


def _peak_of_this_process(system: str, shape: Shape, threads: int) -> int:
    torch.set_num_threads(threads)
    before = _status_bytes("VmRSS")
    _take_steps(system, shape, torch.device("cpu"))
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no line {key}.")
    return 1024 * int(match.group(1))
