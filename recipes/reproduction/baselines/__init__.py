"""Every comparison system of the BitFit paper, LoRA, and BitFit by default, behind one interface: see [`Method`]."""

from __future__ import annotations

from typing import Any

from .adapter import Adapter
from .base import Method, TrainableCount
from .bitfit import BitFit, BitFitDefault
from .diff_pruning import DiffPruning
from .full import Frozen, Full
from .lora import Lora
from .random_subset import RandRowCol, RandUniform

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "bitfit": BitFit,
    "frozen": Frozen,
    "rand_uniform": RandUniform,
    "rand_row_col": RandRowCol,
    "diff_pruning": DiffPruning,
    "adapter": Adapter,
    "lora": Lora,
    "bitfit_default": BitFitDefault,
}

__all__ = ["METHODS", "Method", "TrainableCount", "make_method"]


def make_method(name: str, *, seed: int = 0, **options: Any) -> Method:
    """
    Makes a method by its name.

    Args:
        name (`str`):
            One of [`METHODS`], or `"bitfit:<terms>"` for a subset of the bias terms: `"bitfit:query+intermediate"`,
            `"bitfit:b_m2"`.
        seed (`int`, *optional*, defaults to 0): For what the method draws.
        options: The method's own: `budget` of `rand_*`, `bottleneck` of `adapter`, `sparsity` of `diff_pruning`, ...

    Raises:
        `ValueError`: There is no such method, or no such bias term.

    Example:

    ```python
    >>> make_method("bitfit:b_q+b_m2").name
    'bitfit:query+intermediate'
    ```
    """
    kind, _, terms = name.partition(":")
    if kind not in METHODS or (":" in name and (kind != "bitfit" or not terms)):
        raise ValueError(
            f"There is no method {name!r}. Choose from {', '.join(METHODS)}, or a subset of the bias terms such as "
            "bitfit:query+intermediate."
        )
    if terms:
        options["terms"] = terms
    return METHODS[kind](seed=seed, **options)
