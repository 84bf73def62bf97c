"""The paper's bias terms, and where they live in an architecture."""

from .heads import head_modules
from .selection import find_biases, select_biases, unknown_vectors
from .survey import Bias
from .vocabulary import SYMBOLS, TERMS, resolve_terms

__all__ = [
    "SYMBOLS",
    "TERMS",
    "Bias",
    "find_biases",
    "head_modules",
    "resolve_terms",
    "select_biases",
    "unknown_vectors",
]
