"""OWL (Yin et al., ICML 2024): blocks with more outliers keep more of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from sqft.api import Allocator, LinearShape, LinearStats, StageError, Statistic, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Owl(Allocator):
    """Outlier-weighted layerwise sparsity: the more of a block's Wanda scores are outliers, the lower its sparsity."""

    name = "owl"
    needs = frozenset({Statistic.INPUT_NORM})
    outlier: float = Field(5.0, gt=1, description="a score above this many times the block's mean is an outlier (M)")
    spread: float = Field(
        0.08,
        ge=0,
        lt=0.5,
        description="the kept fractions of blocks differ by up to twice this: -spread to +spread (λ)",
    )

    def measure(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> Mapping[str, float]:
        """Return the share of a block's scores |W| · ‖X‖ above `outlier` times their mean: one number for the block."""
        total, count = 0.0, 0
        for name, weight in weights.items():
            total += float(self._scores(weight, stats[name]).double().sum())
            count += weight.numel()
        bar = self.outlier * total / count
        outliers = sum(int((self._scores(weight, stats[name]) > bar).sum()) for name, weight in weights.items())
        return dict.fromkeys(weights, outliers / count)

    def allocate(
        self, linears: Sequence[LinearShape], sparsity: float, measured: Mapping[str, float]
    ) -> Mapping[str, float]:
        sizes = {linear.name: linear.out_features * linear.in_features for linear in linears}
        low, high = min(measured.values()), max(measured.values())
        scale = 2 * self.spread / (high - low) if high > low else 0.0
        kept = {name: (measured[name] - low) * scale for name in sizes}
        # Weighted by size, so that the sparsity of all layers together is exact.
        mean = sum(kept[name] * size for name, size in sizes.items()) / sum(sizes.values())
        allocation = {name: sparsity - (kept[name] - mean) for name in sizes}
        if min(allocation.values()) < 0 or max(allocation.values()) >= 1:
            raise StageError(
                f"owl: a spread of {self.spread:g} around a sparsity of {sparsity:g} goes below 0 or above 1; "
                "use a smaller spread"
            )
        return allocation

    @staticmethod
    def _scores(weight: Tensor, stats: LinearStats) -> Tensor:
        assert stats.input_sq_sum is not None
        return weight.abs() * stats.input_sq_sum.sqrt()


@hookimpl
def sqft_allocators() -> Iterator[type[Allocator]]:
    yield Owl
