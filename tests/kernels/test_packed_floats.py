"""MXFP4 and float8 as floats, against the formats' definitions value by value."""

from __future__ import annotations

import math

import pytest
import torch
from packed_checkpoints import to_fp8, to_mxfp4

from sqft.kernels.packed_floats import E2M1, exponents, from_float8, from_mxfp4


def test_every_code_of_mxfp4() -> None:
    """A sign, two bits of exponent with a bias of 1, one of mantissa, and subnormals where the exponent is 0."""
    for code in range(8):
        exponent, mantissa = code >> 1, code & 1
        assert E2M1[code] == (mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2))
    low, high = torch.arange(16, dtype=torch.uint8), torch.arange(16, dtype=torch.uint8).flip(0)
    values = from_mxfp4((low + 16 * high).view(1, 1, 16), torch.full((1, 1), 130, dtype=torch.uint8))  # times 8
    expected = [8 * (-1) ** (code >= 8) * E2M1[code % 8] for pair in zip(low, high, strict=True) for code in pair]
    assert values.tolist() == [expected]


@pytest.mark.parametrize("byte", [0, 1, 126, 127, 128, 254])
def test_a_byte_is_an_exponent(byte: int) -> None:
    assert exponents(torch.tensor([byte], dtype=torch.uint8)).item() == math.ldexp(1, byte - 127)


def test_mxfp4_as_packed_elsewhere() -> None:
    weight = torch.randn(3, 64, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 64)[:, None]
    parts, floats = to_mxfp4(weight)
    values = from_mxfp4(parts["blocks"], parts["scales"])
    assert values.shape == (3, 20, 64) and values.mT.equal(floats)
    assert (floats - weight).abs().max() < 0.2 * weight.abs().max() and len(floats.unique()) > 20


@pytest.mark.parametrize("block", [(128, 128), (32, 16), (20, 24), (1, 64)])
@pytest.mark.parametrize("shape", [(96, 64), (40, 33), (130, 200)])
def test_float8_in_blocks(block: tuple[int, int], shape: tuple[int, int]) -> None:
    """Also where the last blocks are smaller than the others: DeepSeek's kv_a_proj_with_mqa has 576 outputs."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parts, floats = to_fp8(weight, *block)
    assert from_float8(parts["weight"], parts["weight_scale_inv"], block).equal(floats)
    assert (floats - weight).abs().max() < 0.1 * weight.abs().max()


def test_float8_with_a_scale_for_each_row_or_for_all() -> None:
    codes = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    rows = torch.rand(2, 6)
    expected = codes.float() * rows[..., None]
    assert from_float8(codes, rows, None).equal(expected)
    assert from_float8(codes, rows[..., None], (128, 128)).equal(expected)
    assert from_float8(codes, torch.tensor([[0.5]]), None).equal(codes.float() / 2)
    assert from_float8(codes, torch.tensor(0.5), None).equal(codes.float() / 2)
    assert from_float8(codes, torch.full((1,), 126, dtype=torch.uint8), None).equal(codes.float() / 2)
