"""Relative importance and activations (RIA; Zhang et al., ICLR 2024) as an sqft scorer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from sqft.api import LinearStats, Scorer, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Ria(Scorer):
    """|W| relative to its row and its column, times the input norm to a power."""

    name = "ria"
    power: float = Field(0.5, ge=0.0, le=2.0, description="how much the activations count")

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        size = weight.abs()  # [out, in]
        relative = size / size.sum(0, keepdim=True) + size / size.sum(1, keepdim=True)
        return relative.nan_to_num() * (stats.input_sq_sum / stats.tokens).sqrt() ** self.power


@hookimpl
def sqft_scorers() -> Iterator[type[Scorer]]:
    yield Ria
