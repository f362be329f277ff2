"""The Hessian of a layer's squared output error, as GPTQ and SparseGPT use it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sqft.kernels.finite import all_finite

ATTEMPTS = 6
"""How often the damping is raised, tenfold each time, while the Hessian is not positive definite."""

SMALL = 256
"""Rows of a triangular matrix that is inverted at once."""


def inverse_factor(H: Tensor, damp: float, damp_by: Literal["mean", "input"] = "mean") -> Tensor:
    """Return the upper Cholesky factor U [in, in] of the damped inverse, H⁻¹ = Uᵀ U, for H [in, in], the sum of x xᵀ.

    `damp` times the mean of the diagonal is added to the diagonal; or, damped by input, `damp` times the entry itself.
    An input that was always zero gets the others' mean there: its weights are rounded by themselves.

    Raises:
        ValueError: when H is not positive definite under any damping tried.
    """
    diagonal, dead = H.diagonal().clone(), H.diagonal() == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    added = diagonal if damp_by == "input" else diagonal.mean().expand_as(diagonal)
    for attempt in range(ATTEMPTS):
        # Backwards H is L Lᵀ, so H is V Vᵀ of an upper V, which is L backwards; and U = V⁻¹. Each is as large as H, so
        # one takes the place of the other.
        L: Tensor = H.flip(0, 1)
        L.diagonal().copy_((diagonal + damp * 10**attempt * added).flip(0))
        L, wrong = torch.linalg.cholesky_ex(L)
        if not wrong:
            invert_lower(L)
            if all_finite(L):
                return L.flip(0, 1)
    raise ValueError(
        f"the Hessian is not positive definite even when damped by up to {damp * 10 ** (ATTEMPTS - 1):g} of its "
        "diagonal; give more calibration text, a larger damp, or float32"
    )


def invert_lower(L: Tensor) -> None:
    """Put the inverse of a lower triangular matrix [n, n] in its place: of its halves, and what lies between them by
    products."""
    n, half = len(L), len(L) // 2
    if n <= SMALL:
        L.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False))
        return
    first, last = slice(half), slice(half, n)
    for part in (first, last):
        invert_lower(L[part, part])
    L[last, first] = L[last, last] @ (L[last, first] @ L[first, first]).neg_()
