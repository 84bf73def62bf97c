"""BitFit for the Hugging Face stack: train only the biases, share, load and serve the deltas.

Importing this package registers the method `BITFIT` with PEFT and does nothing else.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

# `python -m` is still on the stack when the import is completed, see `__getattr__` below.
_completing = "__version__" in globals()
__version__ = "0.1.0"


# Python's own import is called `_frozen_importlib` until somebody imports `importlib`; `runpy` is behind `python -m`.
_IMPORTERS = ("importlib._bootstrap", "_frozen_importlib", "runpy")


def _for_the_command_line() -> bool:
    """Whether this import is the first half of importing `bitfit_hf.cli`.

    `bitfit --help` and a mistyped option are answered in a tenth of a second, torch takes several to import. Python
    imports a package before what is in it, so the package looks at who asks. Where that cannot be seen, everything is
    imported, which is right in any case and only slower.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") in _IMPORTERS:
            asked = frame.f_locals.get("name") or frame.f_locals.get("mod_name")
            if isinstance(asked, str) and f"{asked}.".startswith(f"{__name__}.cli."):
                return True
    return False


if TYPE_CHECKING or _completing or not _for_the_command_line():
    from . import errors
    from .analysis import bias_change
    from .bank import TaskBank
    from .config import BitFitConfig
    from .delta import BiasDelta, load_delta
    from .errors import *  # noqa: F403
    from .hub import push_to_hub
    from .plot import plot_bias_change
    from .recompute import recompute_activations
    from .storage.fingerprint import base_mismatch
    from .trainer import BitFitCallback, PrivacyConfig, optimizer_groups, recommended_learning_rate
    from .tuner import BitFitLayer, BitFitModel
    from .tuner.merging import merge_and_unload
    from .tuner.registration import register

    __all__ = [
        *errors.__all__,
        "BiasDelta",
        "BitFitCallback",
        "BitFitConfig",
        "BitFitLayer",
        "BitFitModel",
        "PrivacyConfig",
        "PrivateTrainer",
        "TaskBank",
        "base_mismatch",
        "bias_change",
        "export_onnx",
        "load_delta",
        "merge_and_unload",
        "optimizer_groups",
        "plot_bias_change",
        "push_to_hub",
        "recommended_learning_rate",
        "recompute_activations",
    ]

    if TYPE_CHECKING:
        from .bank.onnx.graphs import export_onnx
        from .trainer.private.trainer import PrivateTrainer

    # Imported when they are asked for: transformers' Trainer, which the one is made of, and what the other traces.
    _LATER = {"PrivateTrainer": ".trainer.private.trainer", "export_onnx": ".bank.onnx.graphs"}

    def __getattr__(name: str) -> Any:
        """Loads what few programs use, see `_LATER`."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_LATER[name], __name__), name)

    register()
else:

    def __getattr__(name: str) -> Any:
        """Completes the import when a command, or anyone else in its process, asks for more than the version."""
        if name.startswith("__"):
            raise AttributeError(name)
        from importlib import reload

        del globals()["__getattr__"]
        return getattr(reload(sys.modules[__name__]), name)
