"""The model card: made from facts, and updated without losing what its reader has written into it."""

from ..config import after_save
from .model_card import card_after_save, write_card

__all__ = ["write_card"]

after_save(card_after_save)
