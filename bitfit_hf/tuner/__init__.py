"""The PEFT tuner."""

from .head import BitFitHead, Labels
from .layer import BitFitLayer
from .model import BitFitModel

__all__ = ["BitFitHead", "BitFitLayer", "BitFitModel", "Labels"]
