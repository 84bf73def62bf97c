"""How far each term has moved, for the trackers that a Trainer logs to (TensorBoard, W&B, …)."""

from __future__ import annotations

import torch
from torch import nn

from ..analysis import pieces
from ..delta.parts import grouped
from ..storage.bias_layout import decode_layout
from ..storage.keys import key_of_bias
from ..terms import TERMS
from ..tuner.state import delta_parameters
from .checks import adapter_configs

PREFIX = "bias_change/"


class TermChanges:
    """
    The change of each term of one adapter, over all layers: `‖δ‖₁ / dim(δ)`, the measure of the paper's Figure 1.

    What belongs to which term is looked up once; asking for the figures then costs a pass over the deltas.

    Args:
        model (`nn.Module`): With the adapter injected.
        adapter_name (`str`): Which adapter.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        biases = grouped(decode_layout(adapter_configs(model)[adapter_name].bias_layout or {}))
        layout = {key_of_bias(name): group for name, group in biases.items()}
        self._deltas = [
            (delta, layout[key]) for key, delta in delta_parameters(model, adapter_name).items() if key in layout
        ]

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """The changes by `"bias_change/<term>"`, in the order of the paper's terms and in the unit of a bias."""
        sums: dict[str, list[torch.Tensor]] = {}
        sizes: dict[str, int] = {}
        for delta, biases in self._deltas:
            for bias, values in zip(biases, pieces(delta.detach(), biases), strict=True):
                sums.setdefault(bias.term, []).append(values.abs().sum())
                sizes[bias.term] = sizes.get(bias.term, 0) + values.numel()
        terms = [term for term in TERMS if term in sums]
        if not terms:
            return {}
        # One transfer from the device for all terms: each waits for what the device still has to do.
        totals = torch.stack([torch.stack(sums[term]).sum() for term in terms]).tolist()
        return {PREFIX + term: total / sizes[term] for term, total in zip(terms, totals, strict=True)}
