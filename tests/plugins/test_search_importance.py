"""Importance gives ranks where the deltas, or the loss, miss them."""

from __future__ import annotations

from random import Random

import pytest
from sqft_search.importance import Importance

from sqft.api import RankConfig, RankGroup, SearchSpace, StageError
from sqft.testing import check


def space(*groups: tuple[int, list[float]]) -> SearchSpace:
    return SearchSpace(
        tuple(
            RankGroup(f"g{i}", tuple(range(4 * len(losses), 0, -4)), (f"l{i}",), cost, tuple(losses))
            for i, (cost, losses) in enumerate(groups)
        )
    )


def search(space: SearchSpace, budget: int | None = None) -> RankConfig:
    def evaluate(*_: object) -> float:
        raise AssertionError("it evaluates nothing")

    return Importance(budget=budget).search(space, evaluate, Random(0))  # type: ignore[arg-type]


def test_ranks_go_where_they_are_missed() -> None:
    """As many parameters as at the median ranks, 8 · 10 + 8 · 10."""
    alike = space((10, [0.0, 1.0, 2.0]), (10, [0.0, 5.0, 20.0]))
    assert search(alike) == RankConfig((4, 12))
    assert search(alike, 1000) == RankConfig((12, 12)) and search(alike, 80) == RankConfig((4, 4))
    assert search(space((30, [0.0, 1.0, 2.0]), (10, [0.0, 5.0, 20.0]))) == RankConfig((4, 12))


def test_deltas_that_are_zero_need_no_ranks() -> None:
    assert search(space((10, [0.0, 0.0]), (10, [0.0, 0.0])), 1000) == RankConfig((4, 4))


def test_a_budget_below_the_smallest_ranks() -> None:
    with pytest.raises(StageError, match="importance: the smallest ranks have 80 parameters, the budget is 79"):
        search(space((10, [0.0, 1.0]), (10, [0.0, 1.0])), 79)


class Gradients:
    """An `Evaluate` that has gradients and evaluates nothing."""

    def __init__(self, *changes: list[float]) -> None:
        self.changes, self.asked = changes, list[int | None]()

    def first_order(self, samples: int | None = None) -> tuple[list[float], ...]:
        self.asked.append(samples)
        return self.changes


def test_by_gradients_the_deltas_do_not_count() -> None:
    """A loss that falls with the rank that is taken away is a gain, even where there is room."""
    large_deltas = space((10, [0.0, 9.0, 99.0]), (10, [0.0, 1.0, 2.0]))
    evaluate = Gradients([0.0, 0.1, 0.2], [0.0, 0.5, 2.0])
    searcher = Importance(signal="gradient", samples=7)
    assert searcher.search(large_deltas, evaluate, Random(0)) == RankConfig((4, 12))  # type: ignore[arg-type]
    assert evaluate.asked == [7]
    evaluate = Gradients([0.0, -0.5, -0.25], [0.0, 0.5, 2.0])
    searcher = Importance(signal="gradient", budget=1000, samples=None)
    assert searcher.search(large_deltas, evaluate, Random(0)) == RankConfig((8, 12))  # type: ignore[arg-type]
    assert evaluate.asked == [None]


def test_by_gradients_it_keeps_the_contract() -> None:
    searcher = Importance(signal="gradient")
    check(searcher)
    assert searcher.needs_records() and not Importance().needs_records()
