"""Grids: zero is a point, codes come back, and every step against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft.api import Grid, Quantized
from sqft.kernels.grids import SMALLEST_SCALE, dequantize, fake_quantize, fit_grid, quantize, residual, scale_grid

BITS = st.sampled_from([2, 3, 4, 8])


def weights(seed: int, out: int, inputs: int, shift: float) -> torch.Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) + shift


def loop(row: list[float], bits: int, symmetric: bool) -> tuple[float, int, list[int]]:
    """One group's scale, zero point and codes in Python's own floats."""
    top = 2**bits - 1
    low, high = min(0.0, *row), max(0.0, *row)
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = float(torch.tensor(max((high - low) / top, 2.0**-24)).half())
    zero = (top + 1) // 2 if symmetric or high == low else min(max(round(-low / scale), 1), top)
    if zero == 1:
        scale = max(scale, float(torch.tensor(high / (top - 1)).half()))
    return scale, zero, [min(max(round(value / scale) + zero, 0), top) for value in row]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), BITS, st.booleans(), st.sampled_from([0.0, 3.0, -3.0]))
def test_against_a_loop(seed: int, bits: int, symmetric: bool, shift: float) -> None:
    groups = weights(seed, 5, 8, shift)
    scale, zero = fit_grid(groups, bits, symmetric)
    codes = quantize(groups, Grid(scale.half()[:, None], zero[:, None], -1, bits))
    for row in range(5):
        expected = loop(groups[row].double().tolist(), bits, symmetric)
        assert abs(scale[row].item() - expected[0]) <= 2**-10 * expected[0]  # a float16 either side of a tie
        if scale[row].item() == expected[0]:
            assert zero[row].item() == expected[1]
            off = torch.tensor(expected[2]) - codes[row].int()
            assert off.abs().max() <= 1 and (off != 0).sum() <= 1  # float32's rounding at a tie


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), BITS, st.booleans(), st.booleans(), st.sampled_from([0.0, 3.0, -3.0]))
def test_zero_is_a_point_and_rounding_settles(seed: int, bits: int, symmetric: bool, clip: bool, shift: float) -> None:
    weight = weights(seed, 4, 32, shift)
    weight[:, ::3] = 0
    weight[0] = 0  # a group of zeros
    scale, zero = fit_grid(weight.reshape(4, 2, 16), bits, symmetric, clip)
    grid = Grid(scale.half(), zero, 16, bits)
    assert grid.scale.float().equal(scale) and (scale > 0).all()
    assert zero.min() >= 1 and zero.max() < 2**bits  # a 0 would carry where words are added to
    value = dequantize(Quantized(quantize(weight, grid), grid))
    assert not value[weight == 0].any()
    assert quantize(value, grid).equal(quantize(weight, grid))  # idempotent
    if not (clip or symmetric):
        # Half a step for the code, half for the zero point at the ends of the range, and float16's share of 255 steps.
        assert ((value - weight).abs() <= 1.13 * scale.repeat_interleave(16, 1)).all()


SCALES = st.sampled_from([SMALLEST_SCALE, 3 * SMALLEST_SCALE, 2.0**-14, 1e-3, 0.1, 1.0, 65504.0])


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 999), BITS, SCALES, st.booleans(), st.sampled_from([None, [0, 1, 0, 1, 1, 0, 1, 0]]))
def test_what_was_rounded_comes_back_within_its_code(
    seed: int, bits: int, size: float, symmetric: bool, index: list[int] | None
) -> None:
    """To 1/512 of the scale, on every scale that float16 holds; beyond the grid just inside its last code."""
    g, top = torch.Generator().manual_seed(seed), 2**bits - 1
    scale = (torch.rand(6, 2, generator=g) * size).clamp(min=SMALLEST_SCALE).half()
    scale[0], scale[1] = size, SMALLEST_SCALE
    zero = torch.full((6, 2), 2 ** (bits - 1)) if symmetric else torch.randint(0, top + 1, (6, 2), generator=g)
    grid = Grid(scale, zero.int(), 4, bits, torch.tensor(index).int() if index else None)
    groups = torch.tensor(index or [0] * 4 + [1] * 4)
    steps = torch.rand(6, 8, generator=g) * (top + 3) - zero[:, groups] - 1.5  # up to 1.5 too far, both ways
    steps[2] = steps[2].floor() + 0.5  # on the edge of two codes
    kept = torch.rand(6, 8, generator=g) < 0.5
    floats = steps * scale.float()[:, groups] * kept
    coded = Quantized(quantize(floats, grid), grid, floats)
    rest = residual(coded)
    found = dequantize(coded, rest)
    assert rest.dtype == torch.int8 and quantize(found, grid).equal(coded.codes)
    assert not found[~kept].any() and not rest[~kept].any()
    off = (found.double() - floats.double()) / scale.double()[:, groups]
    low, high = -zero[:, groups] - 0.5, top - zero[:, groups] + 0.5
    inside = (steps > low) & (steps < high) | ~kept
    assert off[inside].abs().max() < 1.51 / 256 and off[inside].abs().median() <= 0.51 / 256
    assert (
        (found / scale.float()[:, groups])[~inside]
        .sub(torch.where(steps < 0, low, high)[~inside])
        .abs()
        .le(0.004)
        .all()
    )


def test_every_residual_keeps_every_code() -> None:
    """All 255 of them, on each of 256 codes."""
    codes, rest = torch.arange(256)[:, None].expand(256, 255), torch.arange(-127, 128)[None].expand(256, 255)
    for size, zero in ((SMALLEST_SCALE, 0), (0.1, 1), (0.3337, 128), (65504.0, 255)):
        grid = Grid(torch.full((256, 1), size).half(), torch.full((256, 1), zero), -1, 8)
        floats = dequantize(Quantized(codes, grid), rest.to(torch.int8))
        assert quantize(floats, grid).equal(codes.to(torch.uint8))
        assert residual(Quantized(codes, grid, floats)).equal(rest.to(torch.int8))


def test_codes_alone_have_no_residual() -> None:
    grid = Grid(torch.ones(1, 1).half(), torch.zeros(1, 1).int(), -1, 4)
    with pytest.raises(ValueError, match="without the floats that were rounded"):
        residual(Quantized(torch.zeros(1, 2).to(torch.uint8), grid))


def test_the_clip_search_never_does_worse() -> None:
    groups = weights(0, 64, 32, 0.0)
    groups[:, 0] *= 8  # an outlier in each

    def error(clip: bool) -> torch.Tensor:
        scale, zero = fit_grid(groups, 3, False, clip)
        grid = Grid(scale.half()[:, None], zero[:, None], -1, 3)
        return (dequantize(Quantized(quantize(groups, grid), grid)) - groups).abs().pow(2.4).sum(-1)

    assert (error(True) <= error(False)).all() and (error(True) < error(False)).float().mean() > 0.5


@pytest.mark.parametrize("index", [[0, 1, 0, 1, 1, 0], None])
def test_groups_by_index_or_side_by_side(index: list[int] | None) -> None:
    weight = weights(1, 3, 6, 0.0)
    where = index or [0, 0, 0, 1, 1, 1]
    scale, zero = fit_grid(
        torch.stack([weight[:, [i for i, g in enumerate(where) if g == h]] for h in (0, 1)], 1), 4, False
    )
    grid = Grid(scale.half(), zero, 3, 4, torch.tensor(index) if index else None)
    value = dequantize(Quantized(quantize(weight, grid), grid))
    for i, g in enumerate(where):
        codes = (weight[:, i] / scale[:, g]).round() + zero[:, g]
        torch.testing.assert_close(value[:, i], scale[:, g] * (codes - zero[:, g]), rtol=0, atol=0)


def test_a_stretched_scale_keeps_its_sign() -> None:
    """Some programs write negative scales; a gain that falls below 0 stops at the smallest step instead."""
    grid = Grid(torch.tensor([[0.5, -0.5, -0.25]]).half(), torch.full((1, 3), 8, dtype=torch.int32), 32, 4)
    assert scale_grid(grid, torch.ones(1, 3)).scale.equal(grid.scale)
    assert scale_grid(grid, torch.tensor([[2.0, 2.0, -1.0]])).scale.tolist() == [[1.0, -1.0, -SMALLEST_SCALE]]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
@pytest.mark.parametrize("size", [-1, 32])
def test_a_layer_without_weights(shape: tuple[int, int], size: int) -> None:
    groups = 1 if size == -1 else shape[1] // size
    grid = Grid(torch.ones(shape[0], groups).half(), torch.full((shape[0], groups), 8), size, 4, None)
    weight = torch.ones(shape)
    codes = quantize(weight, grid)
    assert codes.shape == fake_quantize(weight, grid).shape == dequantize(Quantized(codes, grid)).shape == shape
