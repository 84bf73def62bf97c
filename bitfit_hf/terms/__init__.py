"""The paper's bias terms, and where they live in an architecture."""

from .heads import PEFT_NAMES, SavedNames, class_head, head_modules, part_of, part_tensors
from .pooler import pooler_modules, untrained_pooler
from .selection import find_biases, select_biases, unknown_vectors
from .survey import Bias
from .vocabulary import SYMBOLS, TERMS, resolve_terms

__all__ = [
    "PEFT_NAMES",
    "SYMBOLS",
    "TERMS",
    "Bias",
    "SavedNames",
    "class_head",
    "find_biases",
    "head_modules",
    "part_of",
    "part_tensors",
    "pooler_modules",
    "resolve_terms",
    "select_biases",
    "unknown_vectors",
    "untrained_pooler",
]
