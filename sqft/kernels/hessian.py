"""The Hessian of a layer's squared output error, as GPTQ and SparseGPT use it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sqft.kernels.finite import all_finite

ATTEMPTS = 6
"""How often the damping is raised, tenfold each time, while the Hessian is not positive definite."""


def inverse_factor(H: Tensor, damp: float, damp_by: Literal["mean", "input"] = "mean") -> Tensor:
    """Return the upper Cholesky factor U [in, in] of the damped inverse, H⁻¹ = Uᵀ U, for H [in, in], the sum of x xᵀ.

    `damp` times the mean of the diagonal is added to the diagonal; or, damped by input, `damp` times the entry itself.
    An input that was always zero gets the others' mean there: its weights are rounded by themselves.

    Raises:
        ValueError: when H is not positive definite under any damping tried.
    """
    H = H.clone()
    diagonal, dead = H.diagonal(), H.diagonal() == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    added = diagonal if damp_by == "input" else diagonal.mean().expand_as(diagonal)
    for attempt in range(ATTEMPTS):
        damped = H + (damp * 10**attempt * added).diag()
        L, wrong = torch.linalg.cholesky_ex(damped)
        if not wrong:
            U: Tensor
            U, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not wrong and all_finite(U):
                return U
    raise ValueError(
        f"the Hessian is not positive definite even when damped by up to {damp * 10 ** (ATTEMPTS - 1):g} of its "
        "diagonal; give more calibration text, a larger damp, or float32"
    )
