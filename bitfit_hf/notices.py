"""What a user should read without having set up any logging."""

from __future__ import annotations

import logging
import sys

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging


def notice(logger: logging.Logger, line: str) -> None:
    """Tells one line of what has been done: no warning, but what a user expects to see.

    It is logged at INFO. Where nobody listens to that level it is written to stderr beside the progress bars, unless
    transformers has been told to be silent (`transformers.logging.set_verbosity_error()`).

    Args:
        logger (`logging.Logger`): Of the module that has something to tell.
        line (`str`): What it is.
    """
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", line)
    elif transformers_logging.get_verbosity() <= logging.WARNING:
        tqdm.write(line, file=sys.stderr)
