"""Uniform grids: fit one to a weight, round a weight on it, and read codes back (paper eq. 3–4).

Everything is float32; scales are rounded to float16, the precision they are stored in, before any code is
taken from them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sqft.kernels.checksums import sha256
from sqft.types import Grid, Quantized

SMALLEST_SCALE = 2.0**-24
"""The smallest float16 above zero: no scale is 0, and a group of zeros gets this one."""
CLIP_STEPS = 80
"""How many ranges the clip search tries: the full range times 1, 0.99, … 0.21."""
CLIP_ERROR_POWER = 2.4
"""The power of the error that the clip search minimizes, as in GPTQ's code: between the mean square and the maximum."""
RESIDUAL_PARTS = 256
"""Parts of the scale that a residual counts: 127, its largest, are less than the half that rounds to another code."""


def fit_grid(groups: Tensor, bits: int, symmetric: bool, clip: bool = False) -> tuple[Tensor, Tensor]:
    """Return the scale (float16 values in float32) and zero point (int32), both [...], of groups [..., n].

    value = scale · (code − zero), with zero in [1, 2**bits − 1]. The range of a group always includes 0, so that 0 is
    a grid point. The zero point is at least 1: some programs add 1 to packed words of zero points less one, and a 0
    would carry into its neighbour. `symmetric` sets it to 2**(bits − 1). `clip` also tries smaller ranges and keeps
    the one with the smallest error.
    """
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # [...]
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = _grid(low, high, top, symmetric)
    if not clip:
        return scale, zero
    smallest = _error(groups, scale, zero, top)  # [...]
    for step in range(1, CLIP_STEPS):
        share = 1 - step / 100
        tried_scale, tried_zero = _grid(low * share, high * share, top, symmetric)
        error = _error(groups, tried_scale, tried_zero, top)
        better = error < smallest
        smallest = torch.where(better, error, smallest)
        scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
    return scale, zero


def _grid(low: Tensor, high: Tensor, top: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, both [...], of the ranges from `low` to `high` [...]."""
    scale = ((high - low) / top).clamp(min=SMALLEST_SCALE).half().float()
    middle = torch.full_like(scale, (top + 1) // 2)
    if symmetric:
        return scale, middle.int()
    zero = (-low / scale).round().clamp(1, top)
    # With a zero point of 1, one code fewer is left for the positive end.
    scale = torch.where(zero == 1, torch.maximum(scale, (high / (top - 1)).half().float()), scale)
    return scale, torch.where(high == low, middle, zero).int()


def _error(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Return the rounding error [...] of groups [..., n] on grids [...]."""
    codes = quantize_to_codes(groups, scale[..., None], zero[..., None], top)  # [..., n]
    return (scale[..., None] * (codes - zero[..., None]) - groups).abs().pow(CLIP_ERROR_POWER).sum(-1)


def quantize_to_codes(weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Return codes clamp(round(W / s) + z, 0, top) (paper eq. 3), integers in float32; the shapes broadcast."""
    return (weight / scale).round_().add_(zero).clamp_(0, top)


def group_index(grid: Grid, inputs: int) -> Tensor:
    """Return the group of each input, int64 [in]."""
    if grid.group_index is not None:
        return grid.group_index.long()
    size = inputs if grid.group_size == -1 else grid.group_size
    return torch.arange(inputs, device=grid.scale.device) // size


def expand_per_input(grid: Grid, inputs: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point of each input, float32 [out, in]."""
    scale, zero = grid.scale.float(), grid.zero.float()  # [out, groups]
    if grid.group_index is not None:
        index = grid.group_index.long()
        return scale[:, index], zero[:, index]
    size = inputs if grid.group_size == -1 else grid.group_size
    return scale.repeat_interleave(size, 1)[:, :inputs], zero.repeat_interleave(size, 1)[:, :inputs]


def _by_group(grid: Grid, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the grid's scale and zero point, float32, and tensors [out, in], in shapes that fit together.

    Groups that are whole and in order need no scale for each input: [out, groups, 1] beside [out, groups, inputs of a
    group]. Otherwise all are [out, in].
    """
    inputs = tensors[0].shape[1]
    size = inputs if grid.group_size == -1 else grid.group_size
    if grid.group_index is not None or not tensors[0].numel() or inputs % size:
        return *expand_per_input(grid, inputs), *tensors
    of_groups = (part.float()[..., None] for part in (grid.scale, grid.zero))
    return *of_groups, *(tensor.reshape(len(tensor), -1, size) for tensor in tensors)


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Return codes [out, in], uint8, of a weight [out, in] on a grid: round to nearest (paper eq. 3)."""
    scale, zero, grouped = _by_group(grid, weight.float())
    return quantize_to_codes(grouped, scale, zero, 2**grid.bits - 1).to(torch.uint8).reshape(weight.shape)


def dequantize(quantized: Quantized, residual: Tensor | None = None) -> Tensor:
    """Return the weight [out, in] float32 that codes encode: s · (q − z) (paper eq. 4).

    With a `residual`, what was rounded to them: s · (q − z + r / 256). It rounds to the codes again, bit for bit, as
    float32 is wrong by less than the 1/256 of the scale that is left to the next code; of codes with up to 8 bits.
    """
    scale, zero, *parts = _by_group(quantized.grid, *(p for p in (quantized.codes, residual) if p is not None))
    steps = parts[0].float().sub_(zero)  # to convert first is faster than to subtract floats from bytes
    for between in parts[1:]:
        steps += between / RESIDUAL_PARTS
    return steps.mul_(scale).reshape(quantized.codes.shape)


def residual(quantized: Quantized) -> Tensor:
    """Return how far each compensated float lies from the value of its code, int8 [out, in] in 1/256 of the scale.

    At most 127, so that the code stays the nearest: a float beyond the range of its grid is put just inside the last
    code's part of it. A float that the grid holds, as a pruned weight's 0, gets 0.

    Raises:
        ValueError: when there are no compensated floats.
    """
    if quantized.compensated is None:
        raise ValueError("these codes come without the floats that were rounded to them")
    scale, zero = expand_per_input(quantized.grid, quantized.codes.shape[1])  # [out, in]
    steps = quantized.compensated.float() / scale - (quantized.codes - zero)
    most = RESIDUAL_PARTS // 2 - 1
    return (steps * RESIDUAL_PARTS).round().clamp(-most, most).to(torch.int8)


def fake_quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Return a float32 weight [out, in] rounded to the grid: bit for bit `dequantize(quantize(weight))`."""
    scale, zero, grouped = _by_group(grid, weight)
    return quantize_to_codes(grouped, scale, zero, 2**grid.bits - 1).sub_(zero).mul_(scale).reshape(weight.shape)


def straight_through(
    weight: Tensor, grid: Grid, grad: Tensor, learn_scales: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `fake_quantize`'s value, and the gradients of the weight [out, in] and of the scales [out, groups].

    `grad` [out, in] is d(loss)/d(value). The gradient passes the rounding as if it were not there, and is 0 where
    eq. 3's clamp changes the code. d(s (q − z))/ds is (q − z) − W / s where the clamp leaves the code alone, and
    q − z where it does not (Esser et al., Learned step size quantization, ICLR 2020, eq. 3); the gradient of the
    scales is None unless `learn_scales`.
    """
    scale, zero, grouped, passed = _by_group(grid, weight, grad)
    ratio = grouped / scale
    code = ratio.round().add_(zero)
    clamped = code.clamp(0, 2**grid.bits - 1)
    within, steps = clamped == code, clamped.sub_(zero)
    grad_scale = None
    if learn_scales:
        index, slope = group_index(grid, weight.shape[1]), steps - torch.where(within, ratio, 0)
        grad_scale = torch.zeros_like(grid.scale, dtype=torch.float32)  # [out, groups]
        grad_scale.index_add_(1, index, (passed * slope).reshape(grad.shape))
    return (steps * scale).reshape(weight.shape), (passed * within).reshape(grad.shape), grad_scale


def scale_grid(grid: Grid, scale_multiplier: Tensor) -> Grid:
    """Return the grid with its scales times `scale_multiplier` [out, groups], in the precision they are stored in.

    A scale keeps its sign: some checkpoints have negative ones.
    """
    scale = grid.scale.float()
    size = (scale.abs() * scale_multiplier.detach().float()).clamp(min=SMALLEST_SCALE)
    return dataclasses.replace(grid, scale=size.copysign(scale).half())


def is_symmetric(grid: Grid) -> bool:
    """Return whether every zero point is the middle code, so that a format need not store them."""
    return bool((grid.zero == 2 ** (grid.bits - 1)).all())


def digest_of(layer: Quantized) -> str:
    """Return the SHA-256 over codes, scales, zero points and the group of each input."""
    grid, index = layer.grid, group_index(layer.grid, layer.codes.shape[1])
    return sha256(layer.codes.to(torch.uint8), grid.scale.half(), grid.zero.to(torch.uint8), index.to(torch.int32))


def same(one: Quantized, other: Quantized) -> bool:
    """Return whether two layers have the same codes on the same grid, bit for bit."""
    ours, theirs = one.grid, other.grid
    inputs = one.codes.shape[1]
    return (
        (ours.bits, one.codes.shape) == (theirs.bits, other.codes.shape)
        and one.codes.to(torch.uint8).equal(other.codes.to(torch.uint8))
        and ours.scale.half().equal(theirs.scale.half())
        and ours.zero.int().equal(theirs.zero.int())
        and group_index(ours, inputs).equal(group_index(theirs, inputs))
    )
