"""Plain `nn.Module`s for the zoo of `architectures.py`: no config, no task, names that no table knows, and traps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, INTERMEDIATE = 32, 4, 40


class MLP(nn.Module):
    """Linear layers with a LayerNorm and a BatchNorm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, 12)
        self.batch_norm = nn.BatchNorm1d(12)
        self.last = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.norm(self.first(x)))
        return self.last(F.gelu(self.batch_norm(self.second(x))))


class ConvNet(nn.Module):
    """All three convolutions and a GroupNorm; the input is `[batch, 2, 4, 4, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(2, 4, 3, padding=1)
        self.group_norm = nn.GroupNorm(2, 4)
        self.conv2d = nn.Conv2d(4, 6, 3, padding=1)
        self.conv1d = nn.Conv1d(6, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.group_norm(self.conv3d(x))).mean(2)
        return self.conv1d(F.gelu(self.conv2d(x)).mean(2))


class AttentionNet(nn.Module):
    """A free `nn.MultiheadAttention`, whose `in_proj_bias` fuses query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class TorchEncoder(nn.Module):
    """PyTorch's own transformer encoder, two layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INTERMEDIATE, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class BiasFreeNet(nn.Module):
    """An RMSNorm and projections without any bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH)
        self.down = nn.Linear(WIDTH, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(F.silu(self.up(x))))


class Router(nn.Module):
    """A mixture-of-experts router: its `expert_bias` steers the choice of experts and is added to no activation."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.expert_bias = nn.Parameter(torch.zeros(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.gate(x).sigmoid()
        chosen = (scores + self.expert_bias).topk(2, dim=-1).indices
        return torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))


class TrapNet(nn.Module):
    """What looks like a bias and is none, beside one that is.

    `relative_attention_bias.weight` (a table), `layer_scale` and `gate_bias_scale` (multiplied), `router.expert_bias`
    (chooses), `bias_table` (two-dimensional), `bias_buffer` (no parameter). The only bias terms are `project.bias` and
    `norm.bias`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(10, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.relative_attention_bias = nn.Embedding(8, WIDTH)
        self.layer_scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.gate_bias_scale = nn.Parameter(torch.ones(WIDTH))
        self.bias_table = nn.Parameter(torch.zeros(8, WIDTH))
        self.router = Router()
        self.out = nn.Linear(4, 5, bias=False)
        self.register_buffer("bias_buffer", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.project(x)) * self.layer_scale * self.gate_bias_scale + self.bias_buffer
        x = x + self.relative_attention_bias.weight[0] + self.bias_table[1]
        return self.out(self.router(x))
