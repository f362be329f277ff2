"""HiRA (Huang et al. 2025): a merger whose delta multiplies the weights, so that zeros stay zero by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqft.api import BaseKind, BaseWeight, Merger, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Hira(Merger):
    """The delta is relative to the weight: W + W ⊙ (α/r) (B A), so a zero stays zero without a mask.

    On a quantized base the core rounds the result on the base's own grid. It needs a larger learning rate than
    `sparsepeft`, as the delta is a fraction of each weight.
    """

    name = "hira"
    bases = frozenset(BaseKind)

    def combine(self, base: BaseWeight, delta: Tensor) -> Tensor:
        return base.weight + base.weight * delta

    def derivative(self, base: BaseWeight, delta: Tensor, grad: Tensor) -> Tensor:
        return base.weight * grad


@hookimpl
def sqft_mergers() -> Iterator[type[Merger]]:
    yield Hira
