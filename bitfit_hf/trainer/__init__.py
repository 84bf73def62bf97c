"""Training with an unmodified `Trainer`."""

from .callback import BitFitCallback
from .parameter_groups import optimizer_groups
from .private import PrivacyConfig
from .rates import recommended_learning_rate

__all__ = ["BitFitCallback", "PrivacyConfig", "optimizer_groups", "recommended_learning_rate"]
