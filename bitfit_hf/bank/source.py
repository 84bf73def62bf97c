"""[`DeltaSource`]: where the delta of a task comes from."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

from ..delta.value import BiasDelta
from ..errors import TaskBankError
from ..storage.fetch import fetch_delta


@dataclass
class DeltaSource:
    """Where a task's delta comes from, and comes from again when it has been dropped from memory.

    Args:
        delta ([`BiasDelta`], *optional*): The delta itself.
        place (`str`, *optional*): Else a folder or a Hub repo.
        options (`dict`): `revision`, `token` and the like.
    """

    delta: BiasDelta | None
    place: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None

    @classmethod
    def of(cls, source: BiasDelta | str | os.PathLike[str], options: dict[str, Any]) -> DeltaSource:
        """Describes what the user has given."""
        if isinstance(source, BiasDelta):
            given = sorted(name for name, value in options.items() if value)
            if given:
                raise TaskBankError(f"{', '.join(given)}: this is for a Hub repo, and a BiasDelta was given.")
            return cls(source)
        if not isinstance(source, (str, os.PathLike)):
            raise TaskBankError(
                "A task comes from a BiasDelta, a folder or a Hub repo; got "
                f"{type(source).__name__}. For a tuned model, pass `BiasDelta.from_model(model)`."
            )
        return cls(None, os.fspath(source), options)

    def keep(self) -> None:
        """Makes sure of a delta that may be asked for again: the user's own may be edited meanwhile."""
        self.delta = copy.deepcopy(self.delta)

    def release(self) -> None:
        """Lets go of a delta that will not be asked for again."""
        self.delta = None

    def read(self) -> BiasDelta:
        """Reads the delta; every time the same one.

        Raises:
            [`TaskBankError`]: It has changed since it was added.
            [`BitFitError`]: It cannot be read.
        """
        if self.delta is not None:
            return self.delta
        assert self.place is not None
        fetched = fetch_delta(self.place, **self.options)
        if fetched.commit is not None:
            # A branch may move on. A commit is found in the cache without asking the Hub.
            self.options = {**self.options, "revision": fetched.commit}
        delta = BiasDelta.from_folder(fetched.folder, where=self.place)
        digest = delta.config.weights_digest or delta.digest
        if self.digest is not None and digest != self.digest:
            raise TaskBankError(
                f"{self.place} holds another delta than when it was added to the bank. Remove the task, and add it "
                "again."
            )
        self.digest = digest
        return delta
