"""The Trainer that a callback works for, and having a say in its methods.

Events tell a callback of the model and the arguments, never of the Trainer, and some of what a Trainer does lies
between two events: it calls `model_init`, makes the optimizer, reads a checkpoint, saves. `on_init_end` is sent by a
Trainer's constructor, so there the Trainer is read off the call stack, and its methods are replaced on that one
instance: other Trainers in the process, also those with the same model or the same arguments, are left alone.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

# The frames between an event of the constructor and the constructor: those of the callback and its handler.
_MAX_DEPTH = 10


def trainer_being_made() -> Trainer | None:
    """The Trainer whose constructor has sent the event that is being handled; `None` outside of one."""
    from transformers import Trainer  # whoever makes one has loaded this large module; importing bitfit_hf does not

    constructor = inspect.unwrap(Trainer.__init__).__code__
    frame = sys._getframe(1)
    for _ in range(_MAX_DEPTH):
        if frame is None:
            break
        if frame.f_code is constructor:
            trainer = frame.f_locals.get("self")
            return trainer if isinstance(trainer, Trainer) else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def around(trainer: Trainer, method: str, wrapper: Callable[..., Any]) -> None:
    """Has `wrapper(original, ...)` called in place of a method of this one Trainer.

    Args:
        trainer ([`~transformers.Trainer`]): The Trainer, of any subclass.
        method (`str`): The method's name.
        wrapper (`Callable`): Takes the original method, bound to the Trainer, and then its arguments.
    """
    original = getattr(trainer, method)
    vars(trainer)[method] = functools.wraps(original)(functools.partial(wrapper, original))
