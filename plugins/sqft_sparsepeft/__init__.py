"""SparsePEFT: adapters that merge without losing one zero (paper §2.3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqft.api import BaseKind, BaseWeight, Merger, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class SparsePEFT(Merger):
    """The delta acts only where the base kept a weight: W + (α/r) (B A) ⊙ M (paper eq. 1–2)."""

    name = "sparsepeft"
    bases = frozenset({BaseKind.SPARSE, BaseKind.DENSE})

    def combine(self, base: BaseWeight, delta: Tensor) -> Tensor:
        return base.weight + (delta if base.mask is None else delta * base.mask)

    def derivative(self, base: BaseWeight, delta: Tensor, grad: Tensor) -> Tensor:
        return grad if base.mask is None else grad * base.mask


@hookimpl
def sqft_mergers() -> Iterator[type[Merger]]:
    yield SparsePEFT
