"""BitFit for the Hugging Face stack: train only the biases, share, load and serve the deltas.

Importing this package registers the method `BITFIT` with PEFT and does nothing else.
"""

from __future__ import annotations

__version__ = "0.1.0.dev0"

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
from .trainer import BitFitCallback, optimizer_groups
from .tuner import BitFitLayer, BitFitModel
from .tuner.registration import register

__all__ = [
    *errors.__all__,
    "BiasDelta",
    "BitFitCallback",
    "BitFitConfig",
    "BitFitLayer",
    "BitFitModel",
    "TaskBank",
    "base_mismatch",
    "bias_change",
    "load_delta",
    "optimizer_groups",
    "plot_bias_change",
    "push_to_hub",
    "recompute_activations",
]

register()
