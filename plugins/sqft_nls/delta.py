"""The trainable factors. This module imports torch, so it is imported only when a delta is made."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from sqft.api import LinearShape


class LowRankDelta(nn.Module):
    """B [out, r] of zeros, and A [r, in] Kaiming-uniform as in LoRA: the delta is 0 at the start.

    Both are float32 on the CPU, whatever torch's defaults are.
    """

    def __init__(self, linear: LinearShape, rank: int, scale: float, generator: Generator) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        bound = 1 / math.sqrt(linear.in_features)  # kaiming_uniform with a = √5
        A = torch.rand(rank, linear.in_features, generator=generator, dtype=torch.float32, device="cpu")
        self.A = nn.Parameter(A * (2 * bound) - bound)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=torch.float32, device="cpu"))

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        return self.B[:, :rank], self.A[:rank], self.scale
