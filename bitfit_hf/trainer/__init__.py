"""Training with an unmodified `Trainer`."""

from .callback import BitFitCallback
from .parameter_groups import optimizer_groups

__all__ = ["BitFitCallback", "optimizer_groups"]
