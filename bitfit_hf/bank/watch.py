"""[`Watch`]: notices that somebody writes into the weights that a bank shares with the model it was given.

A bank copies no weights, so a delta written into the model (`load_delta`), a training step, or an edit by hand reaches
the bank too. Most of its layers would compute with the new values, those that keep `b_0 + δ` with the old ones.

What is noticed, and when:

- With every request, whatever torch counts as a write: in-place operations (`copy_`, `add_`, item assignment, also
  under `no_grad` and in inference mode), `load_state_dict`, `load_delta`, most optimizers. This reads counters, no
  values.
- Writes through `.data` and by fused optimizers are not counted. For these each request compares the values of one
  tensor, in turn, and adding a task those of all: of a bias that deltas are added to every value, of other tensors a
  few dozen. A write that leaves these few as they were is not noticed.
- Biases whose values have come back (`delta.remove_(model)`) count as unchanged. Of weights no copy is kept, so a
  write that torch has counted is reported whatever was written.

What happens to the given model's modules, or moves its parameters to other memory (`model.to(...)`, `model.half()`),
does not reach the bank at all: it has parameters of its own on the memory that it was made on. (Quantized layers
excepted, whose parameters it shares; transformers refuses to convert these.)
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from ..errors import TaskBankError, collect

_SAMPLES = 64  # values kept of a tensor that deltas are not added to


class _Kept:
    """One tensor, and values that it had when the bank was made."""

    def __init__(self, name: str, tensor: torch.Tensor, *, whole: bool) -> None:
        self.name = name
        self.tensor = tensor.detach()  # has the memory and the counter of writes, whatever its owner does
        self.whole = whole
        # Quantized tensors are not plain, and their layers put other values into them as they compute.
        self.compared = type(self.tensor) is torch.Tensor and not tensor.is_meta and tensor.numel() > 0
        self._places: torch.Tensor | None = None
        if self.compared and not whole:
            last, count = tensor.numel() - 1, min(tensor.numel(), _SAMPLES)
            places = [place * last // max(count - 1, 1) for place in range(count)]
            self._places = torch.tensor(places, device=tensor.device)
        self._values = self._now().clone() if self.compared else None

    def _now(self) -> torch.Tensor:
        return self.tensor if self._places is None else self.tensor.take(self._places)

    def same(self) -> bool:
        """Whether the values are still those."""
        if self._values is None:
            return True
        now = self._now()
        if torch.equal(now, self._values):
            return True
        return bool(((now == self._values) | (now.isnan() & self._values.isnan())).all())


class Watch:
    """Watches the tensors of a model.

    Args:
        model (`nn.Module`): The bank's copy of the base.
        biases (`Container[int]`): Those of its parameters that deltas are added to, by `id`.
    """

    def __init__(self, model: nn.Module, biases: Container[int]) -> None:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        kept = [_Kept(name, tensor, whole=id(tensor) in biases) for name, tensor in tensors]
        self._counted = [one for one in kept if not one.tensor.is_inference()]  # which cannot be written into
        self._views = [one.tensor for one in self._counted]
        self._versions = self._count()
        self._compared = [one for one in kept if one.compared]
        self._next = 0

    def _count(self) -> list[int]:
        return [tensor._version for tensor in self._views]

    def check(self) -> None:
        """Looks for writes, at next to no cost.

        Raises:
            [`TaskBankError`]: The model is no longer what it was.
        """
        versions = self._count()
        if versions != self._versions:
            before = zip(self._counted, versions, self._versions, strict=True)
            written = [kept for kept, now, then in before if now != then]
            self._report([kept for kept in written if not (kept.whole and kept.compared and kept.same())])
            self._versions = versions
        if self._compared:
            number = self._next
            kept = self._compared[number]
            self._report([] if kept.same() else [kept])
            self._next = (number + 1) % len(self._compared)  # not reached where it has changed: it stays the next

    def check_values(self) -> None:
        """Looks for writes, and compares the values of all tensors.

        Raises:
            [`TaskBankError`]: The model is no longer what it was.
        """
        self.check()
        self._report([kept for kept in self._compared if not kept.same()])

    @staticmethod
    def _report(written: list[_Kept]) -> None:
        if written:
            raise TaskBankError(
                f"Values were written into {len(written)} tensors of the model since the bank was made:"
                f"{collect(kept.name for kept in written)}\n"
                "A bank shares its weights with the model that it was given, so its answers would no longer be those "
                "of its tasks. Take a delta out again with `delta.remove_(model)`; after anything else load the base "
                "again and make a new bank. Beside a bank, train or edit a copy (`copy.deepcopy(model)`)."
            )
