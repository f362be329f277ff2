"""SparsePEFT and QA-SparsePEFT: mergers that keep every zero and change no bit in the merge (paper §2.3, §2.4)."""

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

    The core does the rounding, in training and in the merge alike. So the stored codes are those that training used.
    """

    name = "qa-sparsepeft"
    bases = frozenset({BaseKind.QUANTIZED})
    learn_scales: bool = Field(False, description="also train the scales of the grid (the paper keeps them fixed)")

    def learns_scales(self) -> bool:
        return self.learn_scales


@hookimpl
def sqft_mergers() -> Iterator[type[Merger]]:
    yield from (SparsePEFT, QASparsePEFT)
