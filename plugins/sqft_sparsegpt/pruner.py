"""SparseGPT's loop (Frantar and Alistarh, ICML 2023, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.api import Select


def sparsegpt(W: Tensor, U: Tensor, select: Select, block: int) -> tuple[Tensor, Tensor]:
    """Return the pruned weight [out, in] and its mask, for U [in, in], the `inverse_factor` of the sum of x xᵀ.

    Columns are processed in blocks. In each block, the entries with the smallest w² / [H⁻¹]_jj² are pruned, and the
    columns to the right compensate for them, so that ‖W X − Ŵ X‖² is small.
    """
    W, n = W.clone(), W.shape[1]
    mask = torch.ones_like(W, dtype=torch.bool)
    for i1 in range(0, n, block):
        i2 = min(i1 + block, n)
        W1, U1 = W[:, i1:i2].clone(), U[i1:i2, i1:i2]
        mask1 = select((W1 / U1.diagonal()).square())
        E1 = torch.zeros_like(W1)
        for j in range(i2 - i1):
            E1[:, j] = (W1[:, j] * ~mask1[:, j]) / U1[j, j]
            W1[:, j:] -= E1[:, j, None] * U1[j, j:]
        W[:, i1:i2], mask[:, i1:i2] = W1, mask1
        W[:, i2:] -= E1 @ U[i1:i2, i2:]
    return W * mask, mask
