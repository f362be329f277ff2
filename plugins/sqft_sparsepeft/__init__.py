"""SparsePEFT and QA-SparsePEFT: adapters that merge without losing one zero, or one bit (paper §2.3, §2.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

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


class QASparsePEFT(SparsePEFT):
    """SparsePEFT on a quantized base: W + (α/r) (B A) ⊙ M, rounded on the base's own grid (paper eq. 1–4).

    The rounding is the core's, in training and in the merge alike: the codes stored are the ones trained through.
    """

    name = "qa-sparsepeft"
    bases = frozenset({BaseKind.QUANTIZED})
    scale_option = "learn_scales"
    learn_scales: bool = Field(False, description="train the grid's scales too (the paper keeps them)")


@hookimpl
def sqft_mergers() -> Iterator[type[Merger]]:
    yield from (SparsePEFT, QASparsePEFT)
