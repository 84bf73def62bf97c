"""What the layers of a base do with a batch, found out by running it.

That the first dimension of a layer's output is the batch holds for most layers of most models, and where it does not
hold, adding per-example deltas there would give wrong results without an error. So the bank runs its base on batches
of two sizes, and sees which dimension of what grows with the batch and who reads a bias from outside its layer. A
third run compares a mixed batch with its examples one by one.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import TaskBankError
from ..tuner.nested import Path, batch_axis, tensors
from .batch import Batch, running

SIZES = (3, 5)  # no layer's width and no sequence here is a multiple of one and has the other's remainder
_LENGTH = 7
_SAMPLES = 4000  # of audio; a quarter of a second

Shapes = dict[Path, tuple[int, ...]]
Axes = dict[Path, int | None]


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


class Trial:
    """What was seen in runs of the base.

    Args:
        model (`nn.Module`): The bank's copy of the base.
        inputs (`Mapping[str, torch.Tensor]`, *optional*): A batch to run it on; made up where there is none.

    Attributes:
        read_outside (`set`): The layers whose bias other code than their own reads.

    Raises:
        [`TaskBankError`]: The model cannot be run on them.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> None:
        self.model = model
        self._given = inputs
        self.read_outside: set[object] = set()
        small, large = (self._record(size) for size in SIZES)
        self._inputs, self._outputs = (
            {path: _compare(small[path][part], large[path][part]) for path in small.keys() | large.keys()}
            for part in (0, 1)
        )

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        """Inputs for `size` examples, on the model's device; those that were given, taken in turn."""
        if self._given is None:
            inputs = example_inputs(self.model, size)
        else:
            inputs = {name: value[torch.arange(size) % len(value)] for name, value in self._given.items()}
        if not inputs:
            raise TaskBankError(
                f"It is not known what a {type(self.model).__name__} takes, so the bank cannot try it. Pass "
                "`example_inputs=`, a batch as the model's forward takes it."
            )
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in inputs.items()}

    def _record(self, size: int) -> dict[str, tuple[list[Shapes], list[Shapes]]]:
        """Shapes of the arguments and outputs of each call of each module, by its path."""
        calls: dict[str, tuple[list[Shapes], list[Shapes]]] = defaultdict(lambda: ([], []))
        paths = {module: path for path, module in self.model.named_modules()}

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for seen, tree in zip(calls[paths[module]], ((args, kwargs), output), strict=True):
                seen.append({path: tuple(tensor.shape) for path, tensor in tensors(tree).items()})

        inputs = self.batch(size)
        handles = [module.register_forward_hook(see, with_kwargs=True) for module in paths]
        batch = Batch([], size)
        batch.read_outside = self.read_outside
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
    def answer_axes(self) -> Axes:
        """The batch dimension of each tensor that the model returns.

        `None` where several examples come together (CLIP's similarities), [`SHARED`] where it is the same for all.
        """
        return {path: axis for call in self._outputs[""] or () for path, axis in call.items()}

    def reached(self, path: str) -> bool:
        """Whether the module was called."""
        return path in self._outputs

    def output_axis(self, path: str) -> int | None:
        """The batch dimension of the module's output, where it returns one tensor and the same holds in every call."""
        calls = self._outputs.get(path) or ()
        axes = {axis for call in calls for axis in call.values()}
        return axes.pop() if len(axes) == 1 and all(set(call) == {()} for call in calls) else None

    def enclosing(self, path: str) -> str | None:
        """The smallest module around a layer, or the layer, that can be run on a part of the batch."""
        while self.separable(path) is None:
            if not path:
                return None
            path = path.rpartition(".")[0]
        return path

    def separable(self, path: str) -> tuple[dict[Path, int], dict[Path, int]] | None:
        """The batch dimensions of all arguments and outputs of a module that can be run on a part of the batch."""
        inputs, outputs = (_same_in_all(calls.get(path)) for calls in (self._inputs, self._outputs))
        if not inputs or not outputs:
            return None
        if not any(axis >= 0 for axis in inputs.values()) or any(axis < 0 for axis in outputs.values()):
            return None
        return inputs, outputs


def _compare(small: list[Shapes], large: list[Shapes]) -> list[Axes] | None:
    """For each call the batch dimension of every tensor."""
    if len(small) != len(large) or any(a.keys() != b.keys() for a, b in zip(small, large, strict=True)):
        return None
    return [{path: batch_axis(a[path], b[path], SIZES) for path in a} for a, b in zip(small, large, strict=True)]


def _same_in_all(calls: list[Axes] | None) -> dict[Path, int] | None:
    """The batch dimensions, where each is known and the same in every call."""
    axes: dict[Path, int] = {}
    for call in calls or ():
        for path, axis in call.items():
            if axis is None or axes.setdefault(path, axis) != axis:
                return None
    return axes
