"""Means and their standard errors, against numpy and a linearized ratio; models compared on the same windows."""

from __future__ import annotations

import numpy as np
import pytest

from sqft.utils.statistics import paired_difference, weighted_mean

VALUES = np.random.default_rng(0).normal(3, 1, 40)


def test_with_equal_weights_it_is_a_plain_mean() -> None:
    mean, error = weighted_mean(list(VALUES), [7] * 40)
    assert mean == pytest.approx(VALUES.mean())
    assert error == pytest.approx(VALUES.std(ddof=1) / np.sqrt(40))


def test_the_error_of_a_weighted_mean() -> None:
    """That of the mean of w (x − mean) / mean(w), which is the ratio of sums to first order."""
    weights = np.random.default_rng(1).integers(1, 9, 40)
    mean, error = weighted_mean(list(VALUES), list(weights))
    assert mean == pytest.approx(np.average(VALUES, weights=weights))
    linear = weights * (VALUES - mean) / weights.mean()
    assert error == pytest.approx(linear.std(ddof=1) / np.sqrt(40))
    assert weighted_mean([2.0], [3]) == (2.0, None)


def test_a_pair_differs_by_less_than_its_windows_do() -> None:
    noise = np.random.default_rng(2).normal(0, 0.01, 40)
    before = {"windows": list(VALUES), "window_tokens": [31] * 39 + [5]}
    after = {"windows": list(VALUES + 0.1 + noise), "window_tokens": [31] * 39 + [5]}
    difference, error = paired_difference(before, after)
    assert difference == pytest.approx(0.1, abs=0.005) and error is not None and error < 0.003
    with pytest.raises(ValueError, match="other windows"):
        paired_difference(before, {**after, "window_tokens": [31] * 40})
