"""What the layers of a base do with a batch, found out by running it.

That the first dimension of a layer's output is the batch holds for most layers of most models, and where it does not
hold, adding per-example deltas there would be wrong without a sound. So the bank runs its base on batches of two
sizes, and sees which dimension of what grows with the batch and who reads a bias from outside its layer. A third run
compares a mixed batch with its examples one by one.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import TaskBankError
from .batch import Batch, Member, running
from .trees import Path, batch_axis, leaves

SIZES = (3, 5)  # no layer's width and no sequence here is a multiple of one and has the other's remainder
_LENGTH = 7
_SAMPLES = 4000  # of audio; a quarter of a second

Shapes = dict[Path, tuple[int, ...]]


@dataclass
class Calls:
    """The calls of one module in one run: shapes of its arguments and outputs."""

    inputs: list[Shapes] = field(default_factory=list)
    outputs: list[Shapes] = field(default_factory=list)


def example_inputs(model: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """Made-up inputs for a transformers model.

    Args:
        model (`nn.Module`): The model.
        batch_size (`int`): Number of examples.

    Returns:
        `dict[str, torch.Tensor]`: Arguments of its forward; empty if it takes nothing that is known here.
    """
    generator = torch.Generator().manual_seed(0)
    accepted = inspect.signature(type(model).forward).parameters
    config: Any = model.config
    vision = getattr(config, "vision_config", None) or config
    inputs: dict[str, torch.Tensor] = {}
    if "input_ids" in accepted:
        inputs |= _text(config.get_text_config(), batch_size, generator)
        if "token_type_ids" in accepted:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if "pixel_values" in accepted and getattr(vision, "image_size", None) is not None:
        size = vision.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape: tuple[int, ...] = (batch_size, getattr(vision, "num_channels", 3), height, width)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "input_features" in accepted and hasattr(config, "max_source_positions"):
        shape = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.randn(shape, generator=generator)
    if "input_values" in accepted:
        mel = getattr(config, "num_mel_bins", None)
        shape = (batch_size, _SAMPLES) if mel is None else (batch_size, config.max_length, mel)
        inputs["input_values"] = torch.randn(shape, generator=generator)
    if inputs and "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _text(config.get_text_config(), batch_size, generator)["input_ids"]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _text(config: Any, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    special = {i for name in ("pad", "bos", "eos", "cls", "sep", "mask") for i in _token_ids(config, name)}
    usable = torch.tensor([i for i in range(min(config.vocab_size, 1000)) if i not in special])
    ids = usable[torch.randint(len(usable), (batch_size, _LENGTH), generator=generator)]
    mask = torch.ones_like(ids)
    # Without padding some models leave their attention mask out, and it would not be seen.
    mask[1::2, -1] = 0
    for padding in _token_ids(config, "pad")[:1]:
        ids[1::2, -1] = padding
    for eos in _token_ids(config, "eos")[:1]:
        ids[:, -2] = eos  # BART and T5 classify at the end-of-sequence token
    return {"input_ids": ids, "attention_mask": mask}


def _token_ids(config: Any, name: str) -> list[int]:
    """The ids of a special token that the vocabulary has. Configurations name others too: GPT-2's of another size."""
    found = getattr(config, f"{name}_token_id", None)
    ids = found if isinstance(found, (list, tuple)) else [found]
    return [i for i in ids if isinstance(i, int) and 0 <= i < config.vocab_size]


def repeated(inputs: Mapping[str, torch.Tensor], batch_size: int) -> dict[str, torch.Tensor]:
    """A batch of `batch_size` examples, taken in turn from the given ones."""
    return {name: value[torch.arange(batch_size) % len(value)] for name, value in inputs.items()}


class Trial:
    """What was seen in runs of the base.

    Args:
        model (`nn.Module`): The bank's copy of the base.
        inputs (`Mapping[str, torch.Tensor]`, *optional*): A batch to run it on; made up where there is none.

    Raises:
        [`TaskBankError`]: The model cannot be run on them.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> None:
        self.model = model
        self._given = inputs
        self._paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
        self.strangers: set[object] = set()
        self._runs = [self._record(size) for size in SIZES]

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        """Inputs for `size` examples, on the model's device."""
        inputs = example_inputs(self.model, size) if self._given is None else repeated(self._given, size)
        if not inputs:
            raise TaskBankError(
                f"It is not known what a {type(self.model).__name__} takes, so the bank cannot try it. Pass "
                "`example_inputs=`, a batch as the model's forward takes it."
            )
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in inputs.items()}

    def _record(self, size: int) -> dict[str, Calls]:
        calls: dict[str, Calls] = defaultdict(Calls)

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            record = calls[self._paths[module]]
            record.inputs.append(_shapes((args, kwargs)))
            record.outputs.append(_shapes(output))

        inputs = self.batch(size)
        handles = [module.register_forward_hook(see, with_kwargs=True) for module in self._paths]
        batch = Batch([Member(range(size), [0])], size)
        batch.alone, batch.strangers = None, self.strangers
        try:
            with torch.no_grad(), running(batch):
                self.model(**inputs)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError) as error:
            raise TaskBankError(
                f"The trial run of {type(self.model).__name__} on a batch with {sorted(inputs)} failed: "
                f"{type(error).__name__}: {error}\nPass `example_inputs=`, a batch that its forward takes."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return calls

    @property
    def answer_axes(self) -> dict[Path, int | None]:
        """The batch dimension of each tensor that the model returns.

        `None` where several examples come together (CLIP's similarities), [`SHARED`] where it is the same for all.
        """
        _, outputs = self.axes("")
        return {path: axis for call in outputs or () for path, axis in call.items()}

    def reached(self, path: str) -> bool:
        """Whether the module was called."""
        return path in self._runs[0]

    def output_axis(self, path: str) -> int | None:
        """The batch dimension of the module's output, where it returns one tensor and the same holds in every call."""
        _, outputs = self.axes(path)
        found = {axis for call in outputs or () for axis in call.values()}
        single = all(set(call) == {()} for call in outputs or ())
        return found.pop() if len(found) == 1 and single else None

    def separable(self, path: str) -> tuple[dict[Path, int], dict[Path, int]] | None:
        """The batch dimensions of all arguments and outputs of a module that can be run on a part of the batch."""
        inputs, outputs = self.axes(path)
        if not inputs or not outputs:
            return None
        merged: list[dict[Path, int]] = []
        for calls in (inputs, outputs):
            axes: dict[Path, int] = {}
            for call in calls:
                for place, axis in call.items():
                    if axis is None or axes.setdefault(place, axis) != axis:
                        return None
            merged.append(axes)
        if not any(axis >= 0 for axis in merged[0].values()) or any(axis < 0 for axis in merged[1].values()):
            return None
        return merged[0], merged[1]

    def axes(self, path: str) -> tuple[list[dict[Path, int | None]] | None, list[dict[Path, int | None]] | None]:
        """For each call of a module the batch dimension of every argument, and of every output."""
        small, large = (run.get(path) for run in self._runs)
        if small is None or large is None:
            return None, None
        return _compare(small.inputs, large.inputs), _compare(small.outputs, large.outputs)


def _shapes(tree: Any) -> Shapes:
    return {path: tuple(value.shape) for path, value in leaves(tree) if isinstance(value, torch.Tensor)}


def _compare(small: list[Shapes], large: list[Shapes]) -> list[dict[Path, int | None]] | None:
    if len(small) != len(large) or any(a.keys() != b.keys() for a, b in zip(small, large, strict=True)):
        return None
    return [{path: batch_axis(a[path], b[path], SIZES) for path in a} for a, b in zip(small, large, strict=True)]
