"""The effective weight of a linear layer: base, delta and merger become one weight, its codes and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sqft.components.kinds import Merger
from sqft.errors import StageError
from sqft.kernels import grids
from sqft.modeling.adapters.frozen_weight import FrozenWeight
from sqft.types import BaseWeight, Grid, Quantized


def _merged(
    merger: Merger, base: FrozenWeight, B: Tensor, A: Tensor, scale: float, scale_multiplier: Tensor | None
) -> Iterator[tuple[slice, BaseWeight, Tensor, Tensor, Grid | None]]:
    """Blocks of rows of the base, of scale · B A and of combine of the two [rows, in], and the grid to round that on.

    Float32, with autocast off. The law, in one place: forward, backward and merge all take their weights from here.
    """
    with torch.no_grad(), torch.autocast(B.device.type, enabled=False):
        right = A.float() * scale
        for rows in base.rows():
            block, delta, grid = base.block(rows), B[rows].float() @ right, base.grid(rows)
            if grid and scale_multiplier is not None:
                grid = grids.scale_grid(grid, scale_multiplier[rows])
            yield rows, block, delta, merger.combine(block, delta), grid


def effective_weight(
    merger: Merger,
    base: FrozenWeight,
    B: Tensor,
    A: Tensor,
    scale: float,
    scale_multiplier: Tensor | None = None,
    delta_only: bool = False,
) -> Tensor:
    """W_eff [out, in] = combine(W, scale · B A) in the base's dtype, rounded on the base's grid where it has one
    (paper eq. 1–2 for `sparsepeft`, eq. 3–4 for `qa-sparsepeft`).

    `B` [out, r], `A` [r, in], `scale_multiplier` [out, groups] what the grid's scales are multiplied by. Computed
    in float32 whatever the dtypes; not differentiable, see `EffectiveLinear`. `delta_only` gives W_eff − W,
    subtracted before it is rounded to the base's dtype.
    """
    result = torch.empty(base.out_features, base.in_features, dtype=base.dtype, device=B.device)
    with torch.no_grad():
        for rows, block, _, merged, grid in _merged(merger, base, B, A, scale, scale_multiplier):
            if grid:
                merged = grids.fake_quantize(merged, grid)
            result[rows] = merged - block.weight if delta_only else merged
    return result


def effective_codes(
    merger: Merger, base: FrozenWeight, B: Tensor, A: Tensor, scale: float, scale_multiplier: Tensor | None = None
) -> Quantized:
    """The codes [out, in] of `effective_weight`, with their grid (paper eq. 3).

    Raises:
        StageError: when the base has no grid.
    """
    grid = base.grid()
    if grid is None:
        raise StageError("a float base has no codes")
    codes = torch.empty(base.out_features, base.in_features, dtype=torch.uint8, device=B.device)
    for rows, _, _, merged, part in _merged(merger, base, B, A, scale, scale_multiplier):
        assert part is not None
        codes[rows] = grids.quantize(merged, part)
    return Quantized(codes, grid if scale_multiplier is None else grids.scale_grid(grid, scale_multiplier))


class EffectiveLinear(torch.autograd.Function):
    """y = x W_effᵀ + b, or x (W_eff − W)ᵀ. Keeps x, B and A only; backward makes W_eff again, block by block."""

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
        ctx.save_for_backward(x, B, A, scale_multiplier)
        # The base lives in its module anyway: nothing that it holds is kept for longer by this.
        ctx.scale, ctx.merger, ctx.base, ctx.delta_only = scale, merger, base, delta_only
        with torch.autocast(x.device.type, enabled=False):
            merged = effective_weight(merger, base, B, A, scale, scale_multiplier, delta_only).to(x.dtype)
            return F.linear(x, merged, bias.to(x.dtype) if bias is not None else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, scale_multiplier = ctx.saved_tensors
        base: FrozenWeight = ctx.base
        grad = grads[0].reshape(-1, base.out_features)  # [tokens, out]
        inputs = x.reshape(-1, base.in_features)  # [tokens, in]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            shape = (base.out_features, base.in_features)
            wanted = torch.empty(shape, dtype=base.dtype, device=B.device) if ctx.needs_input_grad[0] else None
            # One large matmul: d(loss)/d(W_eff) = dyᵀ x, [out, in].
            grads_of = _gradients(
                ctx.merger, base, B, A, ctx.scale, scale_multiplier, grad.T @ inputs, wanted, ctx.delta_only
            )
            grad_x = (grad @ wanted.to(grad.dtype)).reshape(x.shape) if wanted is not None else None
        return grad_x, None, *grads_of, None, None, None, None


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
        ctx.save_for_backward(B, A, scale_multiplier)
        ctx.scale, ctx.merger, ctx.base = scale, merger, base
        return effective_weight(merger, base, B, A, scale, scale_multiplier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        B, A, scale_multiplier = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(B.device.type, enabled=False):
            return *_gradients(ctx.merger, ctx.base, B, A, ctx.scale, scale_multiplier, grads[0]), None, None, None


def _gradients(
    merger: Merger,
    base: FrozenWeight,
    B: Tensor,
    A: Tensor,
    scale: float,
    scale_multiplier: Tensor | None,
    grad_weight: Tensor,
    wanted: Tensor | None = None,
    delta_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of B, A and the scale multiplier from that of W_eff [out, in].

    Into `wanted` goes W_eff, or W_eff − W.
    """
    right = A.float() * scale
    grad_B, grad_A = torch.zeros_like(B, dtype=torch.float32), torch.zeros_like(A, dtype=torch.float32)
    grad_scale_multiplier = torch.zeros_like(scale_multiplier) if scale_multiplier is not None else None
    for rows, block, delta, merged, grid in _merged(merger, base, B, A, scale, scale_multiplier):
        left, through = B[rows].float(), grad_weight[rows].float()
        if grid:
            merged, through, grad_scale = grids.straight_through(merged, grid, through, scale_multiplier is not None)
            if grad_scale_multiplier is not None and grad_scale is not None and base.scale is not None:
                grad_scale_multiplier[rows] = grad_scale * base.scale[rows].float()
        if wanted is not None:
            wanted[rows] = merged - block.weight if delta_only else merged
        grad_delta = merger.derivative(block, delta, through)
        grad_B[rows] = grad_delta @ right.T
        grad_A.addmm_(left.T, grad_delta, alpha=scale)
    return grad_B.to(B.dtype), grad_A.to(A.dtype), grad_scale_multiplier
