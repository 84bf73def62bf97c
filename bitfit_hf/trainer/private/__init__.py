"""Differentially private bias tuning (DP-BiTFiT).

`config` is what the user says, `sampling` draws the batches, `gradients` clips and adds noise, `ledger` keeps what was
spent and the key of batches and noise, `checks` refuses what would break the guarantee and `study` what only a batch
shows, `trainer` puts them together.
Opacus is imported where it is used: only private training needs it. `trainer` is imported by who makes one, since it
loads transformers' Trainer.
"""

from .config import PrivacyConfig

__all__ = ["PrivacyConfig"]
