"""The trainable factors. This module imports torch, so it is imported when a delta is made."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from sqft.api import LinearShape


class LowRankDelta(nn.Module):
    """B [out, r] zeros, A [r, in] Kaiming-uniform as LoRA has it, float32: the delta is 0 at start."""

    def __init__(self, linear: LinearShape, rank: int, scale: float, generator: Generator) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        bound = 1 / math.sqrt(linear.in_features)  # kaiming_uniform with a = √5
        A = torch.rand(rank, linear.in_features, generator=generator) * (2 * bound) - bound
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        return self.B[:, :rank], self.A[:rank], self.scale
