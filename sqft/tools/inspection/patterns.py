"""Which N:M pattern a weight keeps, counted as its pieces are read."""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = (2, 4, 8, 16, 32)
"""M of the patterns that are looked for; each is twice the one before."""
COMMON = 0.1
"""Part of the groups that must have all N weights. Where a weight is pruned without a pattern, few groups have as many
as the fullest one. In codes, rounding leaves some groups with fewer than the pattern allows."""


class GroupCounts:
    """How many weights are not zero in every group of M neighbours along a row.

    Args:
        inputs: weights in a row. Patterns whose M does not divide them are not looked for, nor the one whose groups
            are whole rows, which any pruning by rows keeps.
    """

    def __init__(self, inputs: int) -> None:
        self._counts = {of: torch.zeros(of + 1, dtype=torch.int64) for of in GROUPS if of < inputs and inputs % of == 0}

    def add(self, kept: Tensor) -> None:
        """Count the groups of some rows, or of a part of all rows that begins and ends with a group.

        Args:
            kept: bool [..., inputs or a part of them], true where a weight is not zero.
        """
        sums = kept.contiguous().view(torch.uint8)
        for of, counts in self._counts.items():
            sums = sums[..., 0::2] + sums[..., 1::2]  # [..., inputs / M]
            counts += torch.bincount(sums.flatten(), minlength=of + 1)

    @property
    def pattern(self) -> str | None:
        """The pattern "N:M" with the smallest share of weights that stay, and of equal ones with the smallest M.

        No group has more than N weights that are not zero, and at least a tenth of the groups have N (`COMMON`). None
        where there is no such pattern with N < M.
        """
        found = []
        for of, counts in self._counts.items():
            kept = max(counts.nonzero().flatten().tolist(), default=of)
            if kept < of and counts[kept] >= COMMON * counts.sum():
                found.append((kept / of, of, f"{kept}:{of}"))
        return min(found)[2] if found else None
