"""SparseGPT's loop (Frantar and Alistarh, ICML 2023, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.api import Select
from sqft_gptq.solver import inverse_factor


def sparsegpt(W: Tensor, H: Tensor, select: Select, *, damp: float, block: int) -> tuple[Tensor, Tensor]:
    """Return the pruned weight [out, in] and its mask for H [in, in], the sum of x xᵀ, with a small ‖W X − Ŵ X‖².

    Columns are processed in blocks. In each block, the entries with the smallest w² / [H⁻¹]_jj² are pruned, and the
    columns to the right compensate for them.
    """
    W, n = W.clone(), W.shape[1]
    U = inverse_factor(H, damp)
    mask = torch.ones_like(W, dtype=torch.bool)
    for start in range(0, n, block):
        end = min(start + block, n)
        diagonal = U.diagonal()[start:end]
        mask[:, start:end] = select((W[:, start:end] / diagonal).square())
        E = torch.zeros_like(W[:, start:end])
        for j in range(start, end):
            E[:, j - start] = (W[:, j] * ~mask[:, j]) / U[j, j]
            W[:, j:end] -= E[:, j - start, None] * U[j, j:end]
        W[:, end:] -= E @ U[start:end, end:]
    return W * mask, mask
