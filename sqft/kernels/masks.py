"""Which entries are kept, given their scores; and masks as bits."""

from __future__ import annotations

import re

import torch
from torch import Tensor

N_M = re.compile(r"([0-9]+):([0-9]+)")


def keep_mask(scores: Tensor, sparsity: float, pattern: str) -> Tensor:
    """A bool mask [out, in], true where the weight stays, for scores [out, in].

    `pattern` "row" prunes the lowest round(sparsity · in) of each row (Wanda's comparison group,
    paper §2.1), "layer" the lowest round(sparsity · out · in) of the matrix, "N:M" keeps the N
    highest of every M along a row, whatever `sparsity` says. Of equal scores the earlier is pruned.

    Raises:
        ValueError: when `sparsity` is not in [0, 1), `pattern` is none of these, or M does not divide the inputs.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1)")
    rows, columns = scores.shape
    if pattern == "row":
        groups, pruned = scores, round(sparsity * columns)
    elif pattern == "layer":
        groups, pruned = scores.reshape(1, -1), round(sparsity * rows * columns)
    else:
        found = N_M.fullmatch(pattern)
        kept, block = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= kept <= block:
            raise ValueError(f"pattern {pattern!r} is none of 'row', 'layer' and 'N:M' with 1 <= N <= M")
        if columns % block:
            raise ValueError(f"{columns} inputs are not a multiple of {block}")
        groups, pruned = scores.reshape(-1, block), block - kept
    order = groups.argsort(dim=1, stable=True)  # lowest first, the earlier first among equals
    mask = torch.ones_like(groups, dtype=torch.bool)
    mask.scatter_(1, order[:, :pruned], False)
    return mask.reshape(rows, columns)


def pack_mask(mask: Tensor) -> Tensor:
    """A bool mask of any shape as uint8 [ceil(n / 8)], little bit order."""
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    return (padded.to(torch.uint8) << _bits(mask)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack_mask`: bool [shape]."""
    bits = (packed[:, None] >> _bits(packed)) & 1
    return bits.bool().reshape(-1)[: shape[0] * shape[1]].reshape(shape)


def _bits(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
