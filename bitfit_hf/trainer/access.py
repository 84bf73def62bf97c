"""The Trainer that a callback works for, and having a say in its methods.

Events tell a callback of the model and the arguments, never of the Trainer, and some of what a Trainer does lies
between two events: it calls `model_init`, makes the optimizer, reads a checkpoint, saves. `on_init_end` is sent by a
Trainer's constructor, so there the Trainer is read off the call stack, and its methods are replaced on that one
instance: other Trainers in the process, also those with the same model or the same arguments, are left alone.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..tuner.call_stack import callers

if TYPE_CHECKING:
    from transformers import Trainer


def trainer_being_made() -> Trainer | None:
    """The Trainer whose constructor has sent the event that is being handled; `None` outside of one."""
    from transformers import Trainer  # whoever makes one has loaded this large module; importing bitfit_hf does not

    constructor = inspect.unwrap(Trainer.__init__).__code__
    for frame in callers():
        if frame.f_code is constructor:
            trainer = frame.f_locals.get("self")
            return trainer if isinstance(trainer, Trainer) else None
    return None


def around(trainer: Trainer, method: str, wrapper: Callable[..., Any]) -> None:
    """Has `wrapper(trainer, original, ...)` called in place of a method of this one Trainer.

    Args:
        trainer ([`~transformers.Trainer`]): The Trainer, of any subclass.
        method (`str`): The method's name.
        wrapper (`Callable`): Takes the Trainer, its original method, and the method's arguments.
    """
    vars(trainer)[method] = _Replaced(trainer, method, wrapper, vars(trainer).get(method))


class _Replaced:
    # Holds the Trainer weakly, so that this makes no cycle and the Trainer is freed as any other. Can be pickled with
    # it, as a search for hyperparameters with Ray does.
    def __init__(
        self, trainer: Trainer, method: str, wrapper: Callable[..., Any], before: Callable[..., Any] | None
    ) -> None:
        self._trainer = weakref.ref(trainer)
        self._method = method
        self._wrapper = wrapper
        self._before = before  # what stood there, such as that of a second callback

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trainer = self._trainer()
        original = self._before or functools.partial(getattr(type(trainer), self._method), trainer)
        return self._wrapper(trainer, original, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Replaced, (self._trainer(), self._method, self._wrapper, self._before)
