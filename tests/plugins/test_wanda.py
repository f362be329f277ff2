"""Wanda and the baselines against loops written from the paper."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_baselines import Magnitude, RandomScorer
from sqft_wanda import Wanda

from sqft.api import LinearStats
from sqft.kernels.masks import keep_mask


@settings(derandomize=True)  # another draw could hold a tie that float32 and float64 break differently
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.floats(0, 0.95), st.integers(0, 999))
def test_the_mask_equals_a_loop_in_float64(rows: int, columns: int, tokens: int, sparsity: float, seed: int) -> None:
    """Paper §2.1: in each row, the round(s · in) entries of smallest |W_ij| · ‖X_j‖₂ go."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator)
    stats = LinearStats(tokens, x.square().sum(0))
    scores = Wanda().score(weight, stats)
    mask = keep_mask(scores, sparsity, "row")
    norms = [math.sqrt(sum(value * value for value in column)) for column in x.double().T.tolist()]
    for row, found, kept in zip(weight.double().tolist(), scores.tolist(), mask.tolist(), strict=True):
        slow = [abs(value) * norm for value, norm in zip(row, norms, strict=True)]
        assert found == pytest.approx(slow, rel=1e-5)
        order = sorted(range(columns), key=lambda j, slow=slow: slow[j])  # type: ignore[misc]
        pruned = set(order[: round(sparsity * columns)])
        assert kept == [j not in pruned for j in range(columns)]


def test_a_dead_input_goes_first() -> None:
    weight = torch.tensor([[9.0, 0.1, 0.2], [-9.0, 0.2, 0.1]])
    stats = LinearStats(4, torch.tensor([0.0, 1.0, 1.0]))
    assert keep_mask(Wanda().score(weight, stats), 1 / 3, "row").tolist() == [[False, True, True]] * 2


def test_magnitude_sees_no_data() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert Magnitude().needs == frozenset()
    assert Magnitude().score(weight, LinearStats(0)).tolist() == [[1, 2], [0, 3]]


def test_random_draws_from_its_generator_alone() -> None:
    def draw(seed: int) -> torch.Tensor:
        stats = LinearStats(0, generator=torch.Generator().manual_seed(seed))
        return RandomScorer().score(torch.ones(3, 4), stats)

    state = torch.get_rng_state()
    assert draw(1).equal(draw(1)) and not draw(1).equal(draw(2))
    assert torch.get_rng_state().equal(state)
