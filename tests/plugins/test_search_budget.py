"""What is chosen is what listing every configuration finds, and the budget holds where costs are rounded too."""

from __future__ import annotations

from itertools import product

import pytest
import sqft_search.budget
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_search.budget import cheapest

Items = list[list[tuple[int, float]]]
items = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9).map(float)), max_size=3).map(
        lambda more: [(0, 9.0), *more]
    ),
    min_size=1,
    max_size=5,
)


def totals(groups: Items, indices: tuple[int, ...]) -> tuple[float, int]:
    chosen = [group[index] for group, index in zip(groups, indices, strict=True)]
    return sum(loss for _, loss in chosen), sum(cost for cost, _ in chosen)


def chosen(groups: Items, budget: int) -> tuple[int, ...]:
    return cheapest([[c for c, _ in group] for group in groups], [[loss for _, loss in g] for g in groups], budget)


def brute_force(groups: Items, budget: int) -> tuple[float, int]:
    every = (totals(groups, indices) for indices in product(*(range(len(group)) for group in groups)))
    return min((loss, cost) for loss, cost in every if cost <= budget)


@settings(deadline=None)
@given(items, st.integers(0, 100))
def test_it_is_the_best_of_all(groups: Items, budget: int) -> None:
    """And of equals the one that costs least."""
    assert totals(groups, chosen(groups, budget)) == brute_force(groups, budget)


@settings(deadline=None)
@given(items, st.integers(0, 100), st.integers(2, 20))
def test_where_costs_are_rounded_the_budget_holds(groups: Items, budget: int, units: int) -> None:
    """And what is found is as good as anything that leaves a unit free for each group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqft_search.budget, "UNITS", units)
        loss, cost = totals(groups, chosen(groups, budget))
    assert cost <= budget
    unit = -(-budget // units)
    assert budget < len(groups) * (unit + 1) or loss <= brute_force(groups, budget - len(groups) * unit)[0]
