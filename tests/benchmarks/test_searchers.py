"""The landscape of `benchmarks/searchers.py`: its closed form, its optimum, and what it counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from random import Random
from typing import Any

import pytest


@pytest.fixture(scope="module")
def searchers() -> Any:
    spec = importlib.util.spec_from_file_location("s", Path(__file__).parents[2] / "benchmarks" / "searchers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_quality_is_the_share_of_right_answers(searchers: Any) -> None:
    """Of 40 landscapes at their medians and optima: 40,960 answers each, within four standard errors."""
    landscapes = [searchers.Landscape(seed, 0.5) for seed in range(40)]
    for indices in ([land.space.median() for land in landscapes], [land.best for land in landscapes]):
        choices = [land.space.choice(index) for land, index in zip(landscapes, indices, strict=True)]
        right = [land(choice) for land, choice in zip(landscapes, choices, strict=True)]
        expected = {land.quality(choice) for land, choice in zip(landscapes, choices, strict=True)}
        assert len(expected) == 1 and sum(right) / 40 == pytest.approx(expected.pop(), abs=4 * 0.5 / 40960**0.5)


def test_nothing_is_better_than_the_best(searchers: Any) -> None:
    landscape, draws = searchers.Landscape(1, 0.25), Random(0)
    best = landscape.quality(landscape.space.choice(landscape.best))
    for _ in range(100):
        choice = landscape.space.choice([draws.randrange(5) for _ in range(searchers.GROUPS)])
        assert landscape.quality(choice) <= best


def test_a_record_counts_once(searchers: Any) -> None:
    landscape = searchers.Landscape(0, 0.25)
    one, other = (landscape.space.choice(indices) for indices in (landscape.space.median(), landscape.best))
    assert landscape.each(one, 16) == landscape.each(one, 64)[:16]
    landscape.each(one, 32), landscape.each(other, 2000)
    assert landscape.evaluated == {one: 64, other: searchers.RECORDS}
