"""Wanda (Sun et al., ICLR 2024), the paper's default scorer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqft.api import LinearStats, Scorer, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Wanda(Scorer):
    """Weight magnitude times input norm: Ψ_ij = |W_ij| · ‖X_j‖₂ (paper §2.1)."""

    name = "wanda"

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        assert stats.input_sq_sum is not None
        return weight.abs() * stats.input_sq_sum.sqrt()  # [out, in] · [in]


@hookimpl
def sqft_scorers() -> Iterator[type[Scorer]]:
    yield Wanda
