"""LoRA and Shears: the adapter stays beside the base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqft.api import BaseKind, BaseWeight, Merger, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Unmerged(Merger):
    """The adapter stays beside the base: W x + (α/r) B A x, stored as a stock PEFT checkpoint."""

    name = "unmerged"
    bases = frozenset(BaseKind)
    merges = False
    keeps_mask = False

    def combine(self, base: BaseWeight, delta: Tensor) -> Tensor:
        return base.weight + delta


@hookimpl
def sqft_mergers() -> Iterator[type[Merger]]:
    yield Unmerged
