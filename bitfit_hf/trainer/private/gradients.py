"""From per-example gradients to the private gradient of an update: clip each example, sum, add noise once, divide."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ...tuner.per_example import Gradient, OuterProduct

Noise = Callable[[torch.Tensor, float], torch.Tensor]


class PrivateSum:
    """The sum of clipped gradients over all forward passes of one update, and over all processes.

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
    def add(self, gradients: Mapping[nn.Parameter, Gradient], scale: torch.Tensor) -> None:
        """Clips and adds a batch.

        Args:
            gradients (`Mapping`): Per-example gradients, `(batch, *parameter.shape)`.
            scale (`torch.Tensor` of shape `(batch,)`): What each example's gradient is multiplied with before, to undo
                the loss's division by what depends on other examples.
        """
        if any(parameter not in self._sums for parameter in gradients):
            raise AssertionError("a gradient of what is not trained would escape the joint norm")
        squares = [_squared_norms(gradient).to(scale.device) for gradient in gradients.values()]
        norms = torch.stack(squares).sum(0).sqrt() * scale.double()
        finite = norms.isfinite()
        # An example without a finite gradient takes no part: it is taken out, since 0 × Inf would be NaN.
        weights = scale.double() * (self.max_grad_norm / norms.clamp(min=1e-300)).clamp(max=1.0)
        weights = torch.where(finite, weights, torch.zeros_like(weights))
        lost = None if bool(finite.all()) else ~finite
        for parameter, gradient in gradients.items():
            self._sums[parameter] += _weighted_sum(gradient, weights.to(parameter.device), lost).to(parameter.dtype)

    @torch.no_grad()
    def release(
        self,
        noise_multiplier: float,
        noise: Noise | None,
        expected_batch_size: float,
        *,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        broadcast: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Puts the noised sum, divided by the expected batch size, into each parameter's `.grad`, and begins anew.

        The real batch size would tell of the data, so it is not what is divided by.

        Args:
            noise_multiplier (`float`): Standard deviation of the noise, in multiples of `max_grad_norm`.
            noise (`Noise`, *optional*): Makes it. `None` in all processes but one: it is added once.
            expected_batch_size (`float`): Over all processes.
            reduce (`Callable`, *optional*): Sums a tensor over all processes.
            broadcast (`Callable`, *optional*): Gives all processes that of the one which makes noise.
        """
        totals = list(self._sums.values())
        flat = torch.cat([total.flatten().to(totals[0].device) for total in totals])
        if reduce is not None:
            flat = reduce(flat)
        if noise_multiplier > 0 and noise is not None:
            flat = flat + noise(flat, noise_multiplier * self.max_grad_norm)
        if broadcast is not None:
            flat = broadcast(flat)
        parts = (flat / expected_batch_size).split([total.numel() for total in totals])
        for parameter, part in zip(self._sums, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.device, copy=True)
        self.clear()


# Squares are taken in float64, in which that of no float32 number overflows; and sums without a float32 product of
# matrices, which a user may have set to TF32 or bf16 and which would then exceed the bound.


def _squared_norms(gradient: Gradient) -> torch.Tensor:
    if isinstance(gradient, OuterProduct):
        return _squared_norms(gradient.rows) * _squared_norms(gradient.columns)
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64).square()


def _weighted_sum(gradient: Gradient, weights: torch.Tensor, lost: torch.Tensor | None) -> torch.Tensor:
    """`sum_i weights[i] * gradient[i]`; of the examples that are `lost`, whatever their values."""
    if isinstance(gradient, OuterProduct):
        rows, columns = (_without(part, lost).double() for part in (gradient.rows, gradient.columns))
        return (rows * weights[:, None]).T @ columns
    gradient = _without(gradient, lost)
    factors = weights.view(-1, *[1] * (gradient.dim() - 1))
    # Of an example whose gradient is huge the float32 weight would be zero or lose its digits.
    exact = bool(((weights == 0) | (weights > 1e-30)).all())
    return (gradient * factors.float()).sum(0) if exact else (gradient.double() * factors).sum(0)


def _without(gradient: torch.Tensor, lost: torch.Tensor | None) -> torch.Tensor:
    if lost is None:
        return gradient
    return gradient.masked_fill(lost.to(gradient.device).view(-1, *[1] * (gradient.dim() - 1)), 0.0)


# --- noise ---


def secure_noise(like: torch.Tensor, std: float) -> torch.Tensor:
    """Gaussian noise from the operating system's generator, by Box and Muller's method in float64.

    Half the sum of four draws, as in Opacus' secure mode: what float arithmetic tells of a single draw is hidden.
    """
    total = torch.zeros(like.numel(), dtype=torch.float64)
    for _ in range(4):
        radius, angle = secure_uniform(like.numel()), secure_uniform(like.numel())
        total += torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)
    return (std * total / 2).view(like.shape).to(like)


def secure_uniform(count: int) -> torch.Tensor:
    """Numbers in (0, 1] with 53 random bits each, from the operating system's generator; float64."""
    bits = torch.frombuffer(bytearray(os.urandom(8 * max(count, 1))), dtype=torch.int64)[:count]
    return ((bits & ((1 << 53) - 1)).double() + 1) / float(1 << 53)


def generator_noise(generator: torch.Generator) -> Noise:
    """Gaussian noise from a torch generator on the CPU."""

    def noise(like: torch.Tensor, std: float) -> torch.Tensor:
        return torch.normal(0.0, std, like.shape, generator=generator, dtype=torch.float32).to(like)

    return noise
