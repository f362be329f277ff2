"""Masks against slow loops, and their properties."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sqft.kernels import masks
from sqft.kernels.masks import keep_mask, pack_mask, unpack_mask

shapes = st.tuples(st.integers(1, 7), st.integers(1, 5).map(lambda n: 4 * n))


@pytest.fixture(scope="module", autouse=True, params=[9, masks.SORTED_AT_ONCE], ids=["in pieces", "at once"])
def sorted_at_once(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "SORTED_AT_ONCE", request.param)
        yield


def scores_of(shape: tuple[int, int], seed: int, ties: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 3, shape, generator=generator).float()
    return torch.rand(shape, generator=generator)


def brute_force(group: list[float], pruned: int) -> list[bool]:
    """Prune one at a time the lowest that is left, the first among equals."""
    kept = [True] * len(group)
    for _ in range(pruned):
        lowest = min((i for i in range(len(group)) if kept[i]), key=lambda i: group[i])
        kept[lowest] = False
    return kept


@given(shapes, st.integers(0, 99), st.booleans(), st.floats(0, 0.95))
def test_row_and_layer_equal_brute_force(shape: tuple[int, int], seed: int, ties: bool, sparsity: float) -> None:
    scores = scores_of(shape, seed, ties)
    rows = [brute_force(row, round(sparsity * shape[1])) for row in scores.tolist()]
    assert keep_mask(scores, sparsity, "row").tolist() == rows
    flat = brute_force(scores.flatten().tolist(), round(sparsity * scores.numel()))
    assert keep_mask(scores, sparsity, "layer").flatten().tolist() == flat


@given(shapes, st.integers(0, 99), st.booleans(), st.sampled_from(["2:4", "1:4", "4:4", "1:2"]))
def test_n_m_equals_brute_force(shape: tuple[int, int], seed: int, ties: bool, pattern: str) -> None:
    scores = scores_of(shape, seed, ties)
    kept, block = map(int, pattern.split(":"))
    mask = keep_mask(scores, 0.5, pattern)
    for row, found in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), block):
            assert found[start : start + block] == brute_force(row[start : start + block], block - kept)


@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (0.5, "2:4", "6 inputs are not a multiple of 4"),
        *(
            (0.5, odd, re.escape(f"pattern {odd!r}"))
            for odd in ("5:4", "0:4", "0:0", "2:0", "-1:3", "2:3:3", "2:", "rows", "")
        ),
        *(
            (odd, pattern, f"sparsity {odd}")
            for odd in (1.0, -0.1, 50, math.nan)
            for pattern in ("row", "layer", "1:2")
        ),
    ],
)
def test_what_makes_no_mask(sparsity: float, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keep_mask(torch.rand(2, 6), sparsity, pattern)


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 99))
def test_bits_round_trip(shape: tuple[int, int], seed: int) -> None:
    mask = scores_of(shape, seed, False) > 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and len(packed) == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, shape), mask)


def test_bit_order_is_little() -> None:
    assert pack_mask(torch.tensor([[True, False, True]])).tolist() == [5]
