"""The delta as a value: reading, writing, calculating with it, applying it to a stock model."""

from .value import BiasDelta, load_delta

__all__ = ["BiasDelta", "load_delta"]
