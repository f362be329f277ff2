"""Masked coordinate descent on a fixed grid, after GPTQ: it has no inverse, so a mask costs it nothing.

The iteration is QuantEase's (Behdin et al., arXiv 2309.01885), from GPTQ's codes, and over the kept weights alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sqft.api import Quantized
from sqft.kernels.grids import dequantize, group_index, quantize_to_codes

BLOCK = 128
"""Inputs between updates of the gradient of all inputs, which are matrix products."""


def shrunk(H: Tensor, damp: float) -> Tensor:
    """Return H̃ = H + damp · diag(H) [in, in]: correlations count 1 / (1 + damp) as much. An input that was always zero
    gets 1 on the diagonal, so that its weights are rounded by themselves."""
    diagonal = H.diagonal()
    return H + torch.diag(damp * diagonal + (diagonal == 0))


def refine(start: Quantized, T: Tensor, H: Tensor, mask: Tensor | None, order: Tensor, passes: int) -> Quantized:
    """Return codes on the grid of `start` whose error tr((T − V) H (T − V)ᵀ) is no larger than its own, and the floats
    that were rounded to them.

    One input after the other takes its best codes, given the codes of all others: with G = (T − V) H, the parabola's
    lowest point is t = V_j + G_j / H_jj, and the nearest value of the grid is the best one. A pass visits every input;
    passes end early when no code moves.

    Args:
        start: codes [out, in] on their grid.
        T: the weight [out, in] whose output is to be matched, float32. It may differ from 0 where `mask` is false.
        H: the sum of x xᵀ [in, in], its diagonal above 0.
        mask: bool [out, in], true where a weight is kept; the others' codes do not change.
        order: the inputs in the order of the visits [in].
        passes: the most passes over all inputs, 1 or more.
    """
    top = 2**start.grid.bits - 1
    E = (T - dequantize(start)).T.contiguous()  # transposed, so that what belongs to one input lies side by side
    C = torch.zeros_like(E)
    codes, keep = start.codes.T.contiguous(), torch.ones_like(T, dtype=torch.bool).T if mask is None else mask.T
    scale, zero, index = start.grid.scale.T.float(), start.grid.zero.T.float(), group_index(start.grid, len(order))
    for _ in range(passes):
        moved = False
        for first in range(0, len(order), BLOCK):
            block = order[first : first + BLOCK]
            rows = H[block]
            G, H1 = rows @ E, rows[:, block]  # [block, out], [block, block]
            q, s, z, kept = codes[block].float(), scale[index[block]], zero[index[block]], keep[block]
            for j, h in enumerate(H1):
                t = s[j] * (q[j] - z[j]) + G[j] / h[j]
                best = torch.where(kept[j], quantize_to_codes(t, s[j], z[j], top), q[j])
                G[j:] -= h[j:, None] * (s[j] * (best - q[j]))
                q[j], C[block[j]] = best, t * kept[j]
            moved |= not q.equal(codes[block])
            codes[block], E[block] = q.to(codes.dtype), T.T[block] - s * (q - z)
        if not moved:
            break
    return replace(start, codes=codes.T.contiguous(), compensated=C.T.contiguous())
