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
        # Backwards H is L Lᵀ, so H is V Vᵀ of an upper V, which is L backwards; and U = V⁻¹.
        backwards = H.flip(0, 1)
        backwards.diagonal().copy_((diagonal + damp * 10**attempt * added).flip(0))
        L, wrong = torch.linalg.cholesky_ex(backwards)
        if not wrong and all_finite(U := inverse_of_lower(L).flip(0, 1)):
            return U
    raise ValueError(
        f"the Hessian is not positive definite even when damped by up to {damp * 10 ** (ATTEMPTS - 1):g} of its "
        "diagonal; give more calibration text, a larger damp, or float32"
    )


def inverse_of_lower(L: Tensor) -> Tensor:
    """Return the inverse [n, n] of a lower triangular matrix: of its halves, and what lies between them by products."""
    inverse = torch.zeros_like(L)
    _invert_into(inverse, L)
    return inverse


def _invert_into(inverse: Tensor, L: Tensor) -> None:
    n, half = len(L), len(L) // 2
    if n <= SMALL:
        inverse.copy_(torch.linalg.solve_triangular(L, torch.eye(n, dtype=L.dtype, device=L.device), upper=False))
        return
    first, last = slice(half), slice(half, n)
    for part in (first, last):
        _invert_into(inverse[part, part], L[part, part])
    torch.mm(inverse[last, last], -(L[last, first] @ inverse[first, first]), out=inverse[last, first])
