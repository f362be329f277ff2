"""The effective weight of a linear layer: base, delta and merger become one weight, its codes and its gradients.

In a run, `combine_rows` is the only caller of a merger's `combine`; the contract tests call it too. Training's
forward and backward, the merge and the check before training take what it returns, so "merging loses nothing" holds by
construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.components.kinds import Merger
from sqft.errors import StageError
from sqft.kernels import grids
from sqft.modeling.adapters.frozen_weight import FrozenWeight
from sqft.types import BaseWeight, Grid, Quantized


class Factors(NamedTuple):
    """A delta of one layer: scale · B A, and factors for the scales of the base's grid, where the scales train too."""

    B: Tensor  # [out, r]
    A: Tensor  # [r, in]
    scale: float
    scale_multiplier: Tensor | None = None  # [out, groups]


@dataclass(frozen=True)
class RowBlock:
    """A block of rows of one layer, float32: its base, its delta, and what `combine` makes of the two."""

    rows: slice
    base: BaseWeight
    delta: Tensor  # [rows, in], scale · B A
    merged: Tensor  # [rows, in], not rounded yet
    grid: Grid | None
    """The grid to round `merged` on; None when the base has none."""


@contextmanager
def outside_autograd(device: torch.device) -> Iterator[None]:
    """Record no gradients and switch autocast off: effective weights are computed in float32."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def combine_rows(
    merger: Merger, base: FrozenWeight, rows: slice, delta: Tensor, scale_multiplier: Tensor | None = None
) -> RowBlock:
    """Combine a block of rows of the base with its delta: the law, in one place.

    Args:
        merger: what defines the effective weight.
        base: the frozen weight [out, in].
        rows: which of its rows.
        delta: scale · B A of these rows, float32 [rows, in].
        scale_multiplier: [out, groups], what the scales of the base's grid are multiplied by.
    """
    block, grid = base.block(rows), base.grid(rows)
    if grid and scale_multiplier is not None:
        grid = grids.scale_grid(grid, scale_multiplier[rows])
    return RowBlock(rows, block, delta, merger.combine(block, delta), grid)


def iter_row_blocks(merger: Merger, base: FrozenWeight, factors: Factors) -> Iterator[RowBlock]:
    """Combine base and delta block by block, so that float32 copies stay in the cache.

    Call it inside `outside_autograd`. It does not switch gradients off itself: that would also affect the caller's code
    between two blocks.
    """
    assert not torch.is_grad_enabled(), "effective weights are computed inside outside_autograd"
    B, A, scale, scale_multiplier = factors
    right = A.float() * scale  # [r, in]
    for rows in base.rows():
        yield combine_rows(merger, base, rows, B[rows].float() @ right, scale_multiplier)


def effective_weight(merger: Merger, base: FrozenWeight, factors: Factors, delta_only: bool = False) -> Tensor:
    """Compute W_eff [out, in] = combine(W, scale · B A) in the base's dtype, rounded on the base's grid if it has one
    (paper eq. 1–2 for `sparsepeft`, eq. 3–4 for `qa-sparsepeft`).

    Computed in float32 whatever the dtypes; not differentiable, see `EffectiveLinear`. `delta_only` gives W_eff − W,
    subtracted before it is rounded to the base's dtype.
    """
    device = factors.B.device
    result = torch.empty(base.out_features, base.in_features, dtype=base.dtype, device=device)
    with outside_autograd(device):
        for block in iter_row_blocks(merger, base, factors):
            merged = grids.fake_quantize(block.merged, block.grid) if block.grid else block.merged
            result[block.rows] = merged - block.base.weight if delta_only else merged
    return result


def effective_codes(merger: Merger, base: FrozenWeight, factors: Factors) -> Quantized:
    """Compute the codes [out, in] of `effective_weight`, with their grid (paper eq. 3).

    Raises:
        StageError: when the base has no grid.
    """
    grid, device = base.grid(), factors.B.device
    if grid is None:
        raise StageError("the base under this adapter is floats, which have no codes")
    codes = torch.empty(base.out_features, base.in_features, dtype=torch.uint8, device=device)
    with outside_autograd(device):
        for block in iter_row_blocks(merger, base, factors):
            assert block.grid is not None
            codes[block.rows] = grids.quantize(block.merged, block.grid)
        multiplier = factors.scale_multiplier
        return Quantized(codes, grid if multiplier is None else grids.scale_grid(grid, multiplier))


class EffectiveLinear(torch.autograd.Function):
    """y = x W_effᵀ + b, or x (W_eff − W)ᵀ. Keeps x, B and A only; backward computes W_eff again, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        B: Tensor,
        A: Tensor,
        scale_multiplier: Tensor | None,
        scale: float,
        merger: Merger,
        base: FrozenWeight,
        delta_only: bool,
    ) -> Tensor:
        """Apply the effective weight.

        Args:
            ctx: autograd's.
            x: [..., in].
            bias: [out].
            B: [out, r].
            A: [r, in].
            scale_multiplier: [out, groups], what the scales of the base's grid are multiplied by.
            scale: of B A.
            merger: what defines the effective weight.
            base: the frozen weight [out, in].
            delta_only: apply W_eff − W.
        """
        ctx.save_for_backward(x, B, A, scale_multiplier)
        # The base lives in its module anyway: nothing that it holds is kept for longer by this.
        ctx.scale, ctx.merger, ctx.base, ctx.delta_only = scale, merger, base, delta_only
        with torch.autocast(x.device.type, enabled=False):
            weight = effective_weight(merger, base, Factors(B, A, scale, scale_multiplier), delta_only).to(x.dtype)
            return F.linear(x, weight, bias.to(x.dtype) if bias is not None else None)  # [..., out]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, scale_multiplier = ctx.saved_tensors
        base, factors = ctx.base, Factors(B, A, ctx.scale, scale_multiplier)
        grad = grads[0].reshape(-1, base.out_features)  # [tokens, out]
        inputs = x.reshape(-1, base.in_features)  # [tokens, in]
        with outside_autograd(x.device):
            # One large matmul: d(loss)/d(W_eff) = dyᵀ x, [out, in].
            of_factors, weight = _gradients(
                ctx.merger, base, factors, grad.T @ inputs, ctx.needs_input_grad[0], ctx.delta_only
            )
            grad_x = (grad @ weight.to(grad.dtype)).reshape(x.shape) if weight is not None else None  # [..., in]
        return grad_x, None, *of_factors, None, None, None, None


class EffectiveWeight(torch.autograd.Function):
    """W_eff itself, for a model that reads it."""

    @staticmethod
    def forward(
        ctx: Any,
        B: Tensor,
        A: Tensor,
        scale_multiplier: Tensor | None,
        scale: float,
        merger: Merger,
        base: FrozenWeight,
    ) -> Tensor:
        """Compute the effective weight; the arguments are those of `EffectiveLinear`."""
        ctx.save_for_backward(B, A, scale_multiplier)
        ctx.scale, ctx.merger, ctx.base = scale, merger, base
        return effective_weight(merger, base, Factors(B, A, scale, scale_multiplier))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        B, A, scale_multiplier = ctx.saved_tensors
        with outside_autograd(B.device):
            of_factors, _ = _gradients(ctx.merger, ctx.base, Factors(B, A, ctx.scale, scale_multiplier), grads[0])
        return *of_factors, None, None, None


def _gradients(
    merger: Merger,
    base: FrozenWeight,
    factors: Factors,
    grad_weight: Tensor,
    with_weight: bool = False,
    delta_only: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor | None]:
    """Compute the gradients of B, A and the scale multiplier from that of W_eff, and on the way W_eff itself.

    Args:
        merger: what defines the effective weight.
        base: the frozen weight [out, in].
        factors: of the delta.
        grad_weight: d(loss)/d(W_eff), [out, in].
        with_weight: return W_eff too, in the base's dtype; else None takes its place.
        delta_only: return W_eff − W instead.
    """
    B, A, scale, scale_multiplier = factors
    weight = (
        torch.empty(base.out_features, base.in_features, dtype=base.dtype, device=B.device) if with_weight else None
    )
    right = A.float() * scale  # [r, in]
    grad_B, grad_A = torch.zeros_like(B, dtype=torch.float32), torch.zeros_like(A, dtype=torch.float32)
    grad_scale_multiplier = torch.zeros_like(scale_multiplier) if scale_multiplier is not None else None
    for block in iter_row_blocks(merger, base, factors):
        rows, merged = block.rows, block.merged
        left, through = B[rows].float(), grad_weight[rows].float()  # [rows, r], [rows, in]
        if block.grid:
            merged, through, grad_scale = grids.straight_through(
                merged, block.grid, through, scale_multiplier is not None
            )
            if grad_scale_multiplier is not None and grad_scale is not None and base.scale is not None:
                grad_scale_multiplier[rows] = grad_scale * base.scale[rows].float()
        if weight is not None:
            weight[rows] = merged - block.base.weight if delta_only else merged
        grad_delta = merger.derivative(block.base, block.delta, through)  # [rows, in]
        grad_B[rows] = grad_delta @ right.T
        grad_A.addmm_(left.T, grad_delta, alpha=scale)
    return (grad_B.to(B.dtype), grad_A.to(A.dtype), grad_scale_multiplier), weight
