"""From per-example gradients to the private gradient of an update: clip each example, sum, add noise once, divide."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import torch
from torch import nn


class PrivateSum:
    """The sum of clipped gradients over all forward passes of one update.

    Args:
        parameters (`list[nn.Parameter]`): All that is trained.
        max_grad_norm (`float`): Bound of an example's contribution, as a norm over all parameters together.
    """

    def __init__(self, parameters: list[nn.Parameter], max_grad_norm: float) -> None:
        self.parameters = parameters
        self.max_grad_norm = max_grad_norm
        self._sums: dict[nn.Parameter, torch.Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets what has been added, of an update that was broken off."""
        self._sums = {parameter: torch.zeros_like(parameter) for parameter in self.parameters}

    @torch.no_grad()
    def add(self, gradients: Mapping[nn.Parameter, torch.Tensor], scale: torch.Tensor) -> None:
        """Clips and adds a batch.

        Args:
            gradients (`Mapping`): Per-example gradients, `(batch, *parameter.shape)`.
            scale (`torch.Tensor` of shape `(batch,)`): What each example's gradient is multiplied with before, to undo
                the loss's division by what depends on other examples.
        """
        unknown = [parameter for parameter in gradients if parameter not in self._sums]
        assert not unknown, "a gradient of what is not trained would escape the joint norm"
        scaled = {
            parameter: gradient * scale.view(-1, *[1] * parameter.dim()) for parameter, gradient in gradients.items()
        }
        # In float64, in which no float32 gradient's square overflows.
        squares = [gradient.double().flatten(1).square().sum(1) for gradient in scaled.values()]
        norms = torch.stack(squares).sum(0).sqrt()
        weights = (self.max_grad_norm / norms.clamp(min=1e-30)).clamp(max=1.0)
        # An example without a finite gradient takes no part; 0 × Inf would be NaN.
        finite = norms.isfinite()
        for parameter, gradient in scaled.items():
            shape = (-1, *[1] * parameter.dim())
            kept = torch.where(finite.view(shape), gradient, torch.zeros_like(gradient))
            clipped = kept.double() * torch.where(finite, weights, torch.zeros_like(weights)).view(shape)
            self._sums[parameter] += clipped.sum(0).to(parameter.dtype)

    @torch.no_grad()
    def release(self, noise_multiplier: float, noise: Noise, expected_batch_size: float) -> None:
        """Puts the noised sum, divided by the expected batch size, into each parameter's `.grad`, and begins anew.

        The real batch size would tell of the data, so it is not what is divided by.
        """
        for parameter, total in self._sums.items():
            if noise_multiplier > 0:
                total = total + noise(total, noise_multiplier * self.max_grad_norm)
            parameter.grad = total / expected_batch_size
        self.clear()


Noise = Callable[[torch.Tensor, float], torch.Tensor]


def secure_noise(like: torch.Tensor, std: float) -> torch.Tensor:
    """Gaussian noise from the operating system's generator, by Box and Muller's method in float64.

    Half the sum of four draws, as in Opacus' secure mode: what float arithmetic tells of a single draw is hidden.
    """
    total = torch.zeros(like.numel(), dtype=torch.float64)
    for _ in range(4):
        radius, angle = _uniform(like.numel()), _uniform(like.numel())
        total += torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)
    return (std * total / 2).view(like.shape).to(like)


def _uniform(count: int) -> torch.Tensor:
    """Numbers in (0, 1] with 53 random bits each."""
    bits = torch.frombuffer(bytearray(os.urandom(8 * max(count, 1))), dtype=torch.int64)[:count]
    return ((bits & ((1 << 53) - 1)).double() + 1) / float(1 << 53)


def generator_noise(generator: torch.Generator) -> Noise:
    """Gaussian noise from a torch generator on the CPU."""

    def noise(like: torch.Tensor, std: float) -> torch.Tensor:
        return torch.normal(0.0, std, like.shape, generator=generator, dtype=torch.float32).to(like)

    return noise
