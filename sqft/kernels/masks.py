"""Which entries are kept, given their scores; and masks as bits."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.types import Pattern

SHIFTS = torch.arange(8, dtype=torch.uint8)
BITS_OF_BYTES = (torch.arange(256, dtype=torch.uint8)[:, None] >> SHIFTS & 1).view(torch.int64).reshape(-1)
"""The eight bits of each byte, lowest first, as eight bytes of 0 or 1 in one number."""

SORTED_AT_ONCE = 1 << 20
"""Scores that are sorted at a time, where that need not be a whole layer: their order takes 8 bytes each."""


def keep_mask(scores: Tensor, sparsity: float, pattern: Pattern | str) -> Tensor:
    """Return a bool mask [out, in], true where the weight stays, for scores [out, in].

    `pattern` "row" prunes the lowest round(sparsity · in) of each row (Wanda's comparison group,
    paper §2.1), "layer" the lowest round(sparsity · out · in) of the matrix, "N:M" keeps the N
    highest of every M along a row, whatever `sparsity` says. Of equal scores the earlier is pruned.

    Raises:
        ValueError: when `sparsity` is not in [0, 1), `pattern` is none of these, or M does not divide the inputs.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1)")
    if isinstance(pattern, str):
        pattern = Pattern.parse(pattern)
    rows, columns = scores.shape
    if pattern.of:
        if columns % pattern.of:
            raise ValueError(f"{columns} inputs are not a multiple of {pattern.of}")
        groups, pruned = scores.reshape(-1, pattern.of), pattern.of - pattern.kept  # [out · in / M, M]
    elif pattern.name == "row":
        groups, pruned = scores, round(sparsity * columns)  # [out, in]
    else:
        groups, pruned = scores.reshape(1, -1), round(sparsity * rows * columns)  # [1, out · in]
    mask = torch.ones_like(groups, dtype=torch.bool)
    at_once = max(1, SORTED_AT_ONCE // max(1, groups.shape[1]))
    for some, scored in zip(torch.split(mask, at_once), torch.split(groups, at_once), strict=True):
        order = scored.argsort(dim=1, stable=True)  # lowest first, the earlier first among equals
        some.scatter_(1, order[:, :pruned], False)
    return mask.reshape(rows, columns)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask of any shape, n entries, into uint8 [ceil(n / 8)]; the first entry is the lowest bit."""
    flat = mask.reshape(-1)  # [n]
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)  # [bytes, 8]
    return (padded.to(torch.uint8) << SHIFTS.to(mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the bool mask [shape] in bytes: the inverse of `pack_mask`."""
    bits = BITS_OF_BYTES.to(packed.device).take(packed.long()).view(torch.bool)  # [8 · bytes]
    return bits[: shape[0] * shape[1]].reshape(shape)
