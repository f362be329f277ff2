"""Least squares under a mask, for all rows of a weight at once, by conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

DEAD = 1e-8
"""An input whose sum of squares is at most this fraction of all inputs' mean counts as dead: its weights stay."""
CONVERGED = 1e-5
"""A row is done when its residual is at most this fraction of what it was at the start."""


def solve(W: Tensor, mask: Tensor, H: Tensor, penalty: Tensor, steps: int) -> Tensor:
    """Return V [out, in], 0 where the mask is false, that minimises ‖(V − W) X‖² + Σ_ij p_j (V_ij − W_ij)², the second
    sum over kept entries.

    With D = V − W on the kept entries and W̃ what is pruned, the gradient is zero where (D (H + diag p) − W̃ H) ⊙ M = 0.
    Each row is a system of its own, of the kept columns; its matrix is the same product for all, so that they are
    solved together by conjugate gradients with residual and direction multiplied by M (the support's projection), and
    1 / diag as preconditioner. The objective falls with every step, and starts at that of the mask alone.

    Args:
        W: the dense weight, float32 [out, in].
        mask: M, bool [out, in], true where kept.
        H: the sum of x xᵀ, float32 [in, in].
        penalty: p, float32 [in].
        steps: the largest number of steps.
    """
    diagonal = H.diagonal()
    alive = diagonal > DEAD * diagonal.mean()
    free = mask & alive
    A = H + penalty.diag()
    inverse = torch.where(alive, 1 / A.diagonal(), 0.0)  # [in]
    D = torch.zeros_like(W)
    R = (W.masked_fill(mask, 0) @ H) * free  # the residual, [out, in]
    P = Z = R * inverse
    rz = (R * Z).sum(1, keepdim=True)  # [out, 1]
    enough, active = CONVERGED**2 * rz, rz > 0
    for _ in range(steps):
        Q = (P @ A) * free
        curvature = (P * Q).sum(1, keepdim=True)
        active = active & (rz > enough) & (curvature > 0)  # rounding may leave a direction without curvature
        if not active.any():
            break
        length = torch.where(active, rz / curvature, 0.0)
        D += length * P
        R -= length * Q
        Z = R * inverse
        before, rz = rz, (R * Z).sum(1, keepdim=True)
        P = Z + torch.where(active, rz / before, 0.0) * P
    return torch.where(mask, W + D, 0.0)
