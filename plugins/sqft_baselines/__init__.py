"""Scorers for comparison. They use no data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqft.api import LinearStats, Scorer, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Magnitude(Scorer):
    """Weight magnitude: |W_ij|."""

    name = "magnitude"
    needs = frozenset()

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        return weight.abs()


class RandomScorer(Scorer):
    """A random number for each weight, seeded by the recipe's seed and the layer's name."""

    name = "random"
    needs = frozenset()

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        import torch

        return torch.rand(weight.shape, generator=stats.generator, device=weight.device)


@hookimpl
def sqft_scorers() -> Iterator[type[Scorer]]:
    yield Magnitude
    yield RandomScorer
