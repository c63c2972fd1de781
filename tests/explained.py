"""Small models for the tests of ``qcompile.explain``."""

from __future__ import annotations

import torch
from torch import nn

EAGER = {"lower": "eager"}


class Block(nn.Module):
    def __init__(self, k: int = 64, n: int = 128) -> None:
        super().__init__()
        self.up = nn.Linear(k, n)
        self.down = nn.Linear(n, k, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Tiny(nn.Module):
    """Three equal layers, a router, a head that is not tied, a convolution, an embedding, and a linear that is never called."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.gate = nn.Linear(64, 4, bias=False)
        self.convolution = nn.Conv1d(64, 64, 3, padding=1)
        self.lm_head = nn.Linear(64, 100)
        self.unused = nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        self.calls += 1
        return self.lm_head(x), self.gate(x).topk(2).values

    def generate(self, ids: torch.Tensor) -> torch.Tensor:
        return self(ids)[0].argmax(-1)


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


IDS = torch.arange(14).reshape(2, 7)
