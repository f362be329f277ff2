"""The sum over the bits: any type, any place in memory, one bit apart."""

from __future__ import annotations

import pytest
import torch

from sqft.kernels.checksums import bit_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 5, 16, 33])
def test_every_bit_counts(dtype: torch.dtype, size: int) -> None:
    tensor = (torch.arange(size + 1) % 2).to(dtype)[1:]  # not where a word begins
    octets = tensor.clone().view(torch.uint8)
    before, whole = bit_sum(tensor), len(octets) // 8 * 8
    words = octets[:whole].clone().view(torch.int64).tolist()
    assert before == (sum(words) + 2**63) % 2**64 - 2**63 + sum(octets[whole:].tolist())
    for place in range(len(octets)):
        moved = octets.clone()
        moved[place] ^= 1
        assert bit_sum(moved.view(dtype)) != before
    assert bit_sum(tensor) == before


def test_a_matrix_of_any_strides() -> None:
    matrix = torch.randn(6, 4)
    assert bit_sum(matrix.T) == bit_sum(matrix.T.contiguous())
    assert bit_sum(torch.tensor(0.0)) == 0 != bit_sum(torch.tensor(-0.0))
