"""GPTQ's loop (Frantar et al., ICLR 2023, Algorithm 1), with pruned weights kept at zero."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.api import Grid, Quantized, StageError
from sqft.kernels.grids import fit_grid, quantize, quantize_to_codes

BLOCK = 128
"""Columns between lazy updates of the rest. Every group size divides it, except -1 (the row), which is fitted first."""
TRIES = 6


def gptq(
    W: Tensor,  # [out, in]
    H: Tensor,  # [in, in]: sum of x xᵀ
    mask: Tensor | None,  # bool [out, in], true where kept
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip: bool,
    damp: float,
    act_order: bool,
    static_groups: bool,
    reorder_groups: bool,
) -> Quantized:
    """Codes and grid that make ‖W X − Ŵ X‖² small. A group's grid is fitted when its first column's turn comes.

    Raises:
        StageError: when the Hessian is not positive definite under any damping tried.
    """
    out, n = W.shape
    size = n if group_size == -1 else group_size
    keep = torch.ones_like(W) if mask is None else mask.to(W.dtype)
    order = torch.arange(n, device=W.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
    elif reorder_groups:
        order = by_groups(H.diagonal(), size)
    static = round_to_nearest(W * keep, None, bits, group_size, symmetric, clip).grid if static_groups else None
    W, keep, U = (W * keep)[:, order], keep[:, order], inverse_factor(H[order][:, order], damp)
    group = order // size if static else torch.arange(n, device=W.device) // size
    scale, zero = W.new_zeros(out, n // size), torch.zeros(out, n // size, dtype=torch.int32, device=W.device)
    if static:
        scale, zero = static.scale.float(), static.zero
    codes = torch.empty(out, n, dtype=torch.uint8, device=W.device)
    groups, top = group.tolist(), 2**bits - 1
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        E = torch.empty(out, end - start, device=W.device)
        for j in range(start, end):
            g = groups[j]
            if not static and j % size == 0:
                scale[:, g], zero[:, g] = fit_grid(W[:, j : j + size], bits, symmetric, clip)
            q = quantize_to_codes(W[:, j], scale[:, g], zero[:, g], top)
            codes[:, j] = q.to(torch.uint8)
            E[:, j - start] = (W[:, j] - scale[:, g] * (q - zero[:, g])) / U[j, j]
            W[:, j:end] -= E[:, j - start, None] * U[j, j:end] * keep[:, j:end]  # pruned weights do not compensate
        W[:, end:] -= (E @ U[start:end, end:]) * keep[:, end:]
    back = order.argsort()
    if reorder_groups and not (act_order or static):  # the groups were reordered, but each still has its own inputs
        turn = (order[::size] // size).argsort()
        scale, zero = scale[:, turn], zero[:, turn]
    index = group[back].int() if act_order and not static and size < n else None
    return Quantized(codes[:, back], Grid(scale.half(), zero, group_size, bits, index))


def by_groups(diagonal: Tensor, size: int) -> Tensor:
    """An order of the inputs [in]: groups of the largest inputs first, and in a group the largest inputs first.

    Group-aware reordering (Gafni, Karnieli, Hanani, CVPR Workshops 2025, arXiv 2505.14638).
    """
    groups = diagonal.reshape(-1, size)
    inside = groups.argsort(dim=1, descending=True, stable=True)  # [groups, size]
    first = groups.amax(1).argsort(descending=True, stable=True)
    return (first[:, None] * size + inside[first]).flatten()


def inverse_factor(H: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor U of H⁻¹ = Uᵀ U, [in, in], with damping raised tenfold while H is not definite.

    An input that was always zero gets the others' mean on the diagonal: its weights are rounded by themselves.
    """
    H = H.clone()
    diagonal, dead = H.diagonal(), H.diagonal() == 0
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    for attempt in range(TRIES):
        damped = H + torch.eye(len(H), device=H.device) * (damp * 10**attempt * diagonal.mean())
        L, wrong = torch.linalg.cholesky_ex(damped)
        if not wrong:
            U: Tensor
            U, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not wrong and U.isfinite().all():
                return U
    raise StageError(
        f"the Hessian is not positive definite even when damped by up to {damp * 10 ** (TRIES - 1):g} of its diagonal; "
        "give more calibration text, a larger damp, or float32"
    )


def round_to_nearest(
    W: Tensor, mask: Tensor | None, bits: int, group_size: int, symmetric: bool, clip: bool
) -> Quantized:
    """Each weight [out, in] on the grid of its contiguous group; pruned ones are 0, which every grid holds."""
    W = W if mask is None else W * mask
    groups = W.reshape(len(W), 1 if group_size == -1 else -1, W.shape[1] if group_size == -1 else group_size)
    scale, zero = fit_grid(groups, bits, symmetric, clip)
    grid = Grid(scale.half(), zero, group_size, bits)
    return Quantized(quantize(W, grid), grid)
