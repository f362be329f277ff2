"""Uniform grids: fit one to a weight, round a weight on it, read codes back (paper eq. 3–4).

Everything is float32; scales are rounded to float16, the precision they are stored in, before any code is
taken from them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sqft.types import Grid, Quantized

SMALLEST = 2.0**-24
"""The smallest float16 above zero: no scale is 0, and a group of zeros gets this one."""
SHRINKS = 80
"""How many ranges the clip search tries, from the whole one down to a fifth of it."""
NORM = 2.4
"""The error's power in the clip search, as GPTQ's authors have it: between mean and worst."""


def fit_grid(groups: Tensor, bits: int, symmetric: bool, clip: bool = False) -> tuple[Tensor, Tensor]:
    """Scale (float16 values in float32) and zero point (int32 in [1, 2**bits − 1]), both [...], of groups [..., n].

    The range of a group always holds 0, so that 0 is a grid point: value = scale · (code − zero). The zero point is
    at least 1: some programs add 1 to packed words of zero points less one, and a 0 would carry into its neighbour.
    `symmetric` puts it at 2**(bits − 1). `clip` tries smaller ranges and keeps the one of the smallest error.
    """
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = _grid(low, high, top, symmetric)
    if not clip:
        return scale, zero
    best = _error(groups, scale, zero, top)
    for step in range(1, SHRINKS):
        share = 1 - step / 100
        tried = _grid(low * share, high * share, top, symmetric)
        error = _error(groups, *tried, top)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return scale, zero


def _grid(low: Tensor, high: Tensor, top: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale = ((high - low) / top).clamp(min=SMALLEST).half().float()
    middle = torch.full_like(scale, (top + 1) // 2)
    if symmetric:
        return scale, middle.int()
    zero = (-low / scale).round().clamp(1, top)
    # Above a zero point of 1 one code less is left for the positive end.
    scale = torch.where(zero == 1, torch.maximum(scale, (high / (top - 1)).half().float()), scale)
    return scale, torch.where(high == low, middle, zero).int()


def _error(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    codes = quantize_to_codes(groups, scale[..., None], zero[..., None], top)
    return (scale[..., None] * (codes - zero[..., None]) - groups).abs().pow(NORM).sum(-1)


def quantize_to_codes(weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes clamp(round(W / s) + z, 0, top) (paper eq. 3), of shapes that broadcast; whole numbers in float32."""
    return ((weight / scale).round() + zero).clamp(0, top)


def group_index(grid: Grid, inputs: int) -> Tensor:
    """The group of each input, int64 [in]."""
    if grid.group_index is not None:
        return grid.group_index.long()
    size = inputs if grid.group_size == -1 else grid.group_size
    return torch.arange(inputs, device=grid.scale.device) // size


def expand_per_input(grid: Grid, inputs: int) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of each input, float32 [out, in]."""
    scale, zero = grid.scale.float(), grid.zero.float()
    if grid.group_index is not None:
        index = grid.group_index.long()
        return scale[:, index], zero[:, index]
    size = inputs if grid.group_size == -1 else grid.group_size
    return scale.repeat_interleave(size, 1)[:, :inputs], zero.repeat_interleave(size, 1)[:, :inputs]


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Codes [out, in], uint8, of a weight [out, in] on a grid: round to nearest (paper eq. 3)."""
    scale, zero = expand_per_input(grid, weight.shape[1])
    return quantize_to_codes(weight.float(), scale, zero, 2**grid.bits - 1).to(torch.uint8)


def dequantize(quantized: Quantized) -> Tensor:
    """The weight [out, in] float32 that codes stand for: s · (q − z) (paper eq. 4)."""
    scale, zero = expand_per_input(quantized.grid, quantized.codes.shape[1])
    return scale * (quantized.codes - zero)


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """What the codes of a float32 weight [out, in] stand for: `dequantize(quantize(weight))`, to the bit."""
    scale, zero = expand_per_input(grid, weight.shape[1])
    return scale * (quantize_to_codes(weight, scale, zero, 2**grid.bits - 1) - zero)


def straight_through(
    weight: Tensor, grid: Grid, grad: Tensor, learn_scales: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`rounded`'s value, and what d(loss)/d(value) `grad` is for the weight [out, in] and the scales [out, groups].

    The gradient passes the rounding as if it were not there, and is 0 where eq. 3's clamp holds. d(s (q − z))/ds is
    (q − z) − W / s where the clamp leaves the code alone, and q − z where it does not (Esser et al., Learned step size
    quantization, ICLR 2020, eq. 3); None unless `learn_scales`.
    """
    scale, zero = expand_per_input(grid, weight.shape[1])
    ratio, top = weight / scale, 2**grid.bits - 1
    code = ratio.round() + zero
    within, steps = (code >= 0) & (code <= top), code.clamp(0, top) - zero
    if not learn_scales:
        return scale * steps, grad * within, None
    index = group_index(grid, weight.shape[1])
    slope = steps - torch.where(within, ratio, 0)
    grad_scale = torch.zeros_like(grid.scale, dtype=torch.float32).index_add_(1, index, grad * slope)
    return scale * steps, grad * within, grad_scale


def scale_grid(grid: Grid, scale_multiplier: Tensor) -> Grid:
    """The grid with its scales multiplied by `scale_multiplier` [out, groups], in the precision they are stored in.

    A scale keeps its sign: there are checkpoints with negative ones.
    """
    scale = grid.scale.float()
    size = (scale.abs() * scale_multiplier.detach().float()).clamp(min=SMALLEST)
    return dataclasses.replace(grid, scale=size.copysign(scale).half())


def is_symmetric(grid: Grid) -> bool:
    """Whether every zero point is the middle code, so that a format need not store them."""
    return bool((grid.zero == 2 ** (grid.bits - 1)).all())


def same(one: Quantized, other: Quantized) -> bool:
    """Whether two layers hold the same codes on the same grid, to the bit."""
    grid, its = one.grid, other.grid
    inputs = one.codes.shape[1]
    return (
        (grid.bits, one.codes.shape) == (its.bits, other.codes.shape)
        and one.codes.to(torch.uint8).equal(other.codes.to(torch.uint8))
        and grid.scale.half().equal(its.scale.half())
        and grid.zero.int().equal(its.zero.int())
        and group_index(grid, inputs).equal(group_index(its, inputs))
    )
