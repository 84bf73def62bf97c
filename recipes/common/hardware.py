"""What a machine is made for."""

from __future__ import annotations

from pathlib import Path

import torch

# What a processor has that multiplies bfloat16 matrices itself; without, they are computed by way of float32, slower
# than float32 itself.
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})  # the last two are those of ARM


def computes_in_bf16(use_cpu: bool, cpuinfo: str | Path = "/proc/cpuinfo") -> bool:
    """
    Whether bfloat16 autocast is worth while here.

    Args:
        use_cpu (`bool`): Whether a GPU is left alone that is there.
        cpuinfo (`str` or `Path`, *optional*): Where Linux describes the processor; elsewhere the answer is no.
    """
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        lines = Path(cpuinfo).read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not BF16_FLAGS.isdisjoint(flags.partition(":")[2].split())
