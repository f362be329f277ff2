"""McNemar's test and the paired bootstrap, against scipy, closed forms and simulated models."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from sqft.utils.significance import bootstrap_interval, mcnemar


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_a_binomial_test_of_the_items_that_differ(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_very_many_items() -> None:
    assert mcnemar(5000, 5000) == 1.0 and 0 < mcnemar(400, 900) < 1e-40


def test_an_interval_of_many_items_is_the_normal_one() -> None:
    """Of n differences with variance s², the mean's interval is close to ± 1.96 s / √n."""
    differences = [1.0] * 300 + [-1.0] * 100 + [0.0] * 600
    low, high = bootstrap_interval(differences)
    mean, variance = 0.2, 0.4 - 0.2**2
    half = 1.96 * math.sqrt(variance / 1000)
    assert low == pytest.approx(mean - half, abs=0.003) and high == pytest.approx(mean + half, abs=0.003)


def test_equal_models_have_an_interval_of_nothing() -> None:
    assert bootstrap_interval([0.0] * 50) == (0.0, 0.0)


def test_the_same_items_give_the_same_interval() -> None:
    draw = random.Random(0)
    differences = [draw.gauss(0, 1) for _ in range(200)]
    assert bootstrap_interval(differences) == bootstrap_interval(differences)
    assert bootstrap_interval(differences) != bootstrap_interval(differences, seed=1)


def test_an_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    """Two models that are right with 0.5 and 0.6: in 200 sets of 150 questions, 95 of 100 intervals hold 0.1."""
    draw = random.Random(0)
    held = 0
    for _ in range(200):
        differences = [float(draw.random() < 0.6) - float(draw.random() < 0.5) for _ in range(150)]
        low, high = bootstrap_interval(differences)
        held += low <= 0.1 <= high
    assert 180 <= held <= 199
