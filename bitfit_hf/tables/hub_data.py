"""Data sets on the Hub."""

from __future__ import annotations

from typing import Any

from datasets import load_dataset

EXPORT = "refs/convert/parquet"  # where the Hub keeps its own conversion of a data set, a folder for each part


def load_from_hub(
    name: str, config: str | None = None, *, revision: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """Loads all splits of a data set.

    Where the data set is a script, which `datasets` no longer runs, and no revision is asked for, the Hub's own
    conversion of it is taken.

    Args:
        name (`str`): Of the data set on the Hub.
        config (`str`, *optional*): Which part of it.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str`, *optional*): For private and gated data sets.

    Returns:
        `dict[str, datasets.Dataset]`: By the name of the split.
    """
    if revision != EXPORT:
        try:
            return dict(load_dataset(name, config, revision=revision, token=token))
        except RuntimeError as error:
            if revision is not None or "scripts are no longer supported" not in str(error):
                raise
    return dict(load_dataset(name, data_dir=config, revision=EXPORT, token=token))
