"""McNemar's test and the paired bootstrap, against scipy, closed forms and simulated models."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from sqft.utils.significance import bootstrap_interval, mcnemar, t_quantile


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_twice_the_tail_of_coins(first: int, second: int) -> None:
    """Fair coins decide which model alone is right: as exact fractions."""
    n, least = first + second, min(first, second)
    tail = Fraction(sum(math.comb(n, k) for k in range(least + 1)), 2**n)
    assert mcnemar(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_mcnemar_of_very_many_items() -> None:
    assert mcnemar(50_000, 50_000) == 1.0 and 0 < mcnemar(400, 900) < 1e-40


def test_students_t() -> None:
    """With one degree of freedom it is Cauchy's: tan(π · 0.475). With two, the closed form t / √(2 + t²) = 0.95."""
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475))
    t = t_quantile(2)
    assert t / math.sqrt(2 + t * t) == pytest.approx(0.95) and t_quantile(10**6) == pytest.approx(1.96, abs=1e-3)


def test_an_interval_is_scipys_bootstrap() -> None:
    draw = random.Random(1)
    differences = [draw.choice([-1.0, 0.0, 0.0, 1.0, 1.0]) for _ in range(300)]
    found = bootstrap((differences,), numpy.mean, method="percentile", n_resamples=10_000, rng=0).confidence_interval
    assert bootstrap_interval(differences) == pytest.approx((found.low, found.high), abs=0.005)


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
