"""Evolution keeps its budgets and its seed, and climbs; without optuna the plan says what to install."""

from __future__ import annotations

from random import Random

import pytest
import sqft_search.evolutionary
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqft_search.evolutionary import Evolutionary

from sqft.api import RankConfig, RankGroup, RecordValue, SearchSpace, StageError

RECORDS = 50


class Counter:
    """An `Evaluate` that prefers large ranks, and counts records."""

    def __init__(self) -> None:
        self.evaluated: dict[RankConfig, int] = {}

    def each(self, choice: RankConfig, samples: int | None = None) -> list[RecordValue]:
        count = min(samples or RECORDS, RECORDS)
        assert choice not in self.evaluated
        self.evaluated[choice] = count
        return [RecordValue(float(sum(choice.ranks)), 1)] * count

    def within(self, seconds: float | None) -> bool:
        return seconds is None or len(self.evaluated) < seconds  # one second each

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float:
        raise AssertionError("it asks record by record")


def space_of(*lengths: int) -> SearchSpace:
    ranks = (tuple(range(n, 0, -1)) for n in lengths)
    return SearchSpace(tuple(RankGroup(f"g{i}", r, (f"l{i}",), cost=10) for i, r in enumerate(ranks)))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 9), st.integers(8, 600), st.none() | st.just(8)
)
def test_budget_and_seed(lengths: list[int], seed: int, evaluations: int, samples: int | None) -> None:
    space, searcher = space_of(*lengths), Evolutionary(evaluations=evaluations, samples=samples, population=4)
    first, again = Counter(), Counter()
    found = searcher.search(space, first, Random(seed))
    assert found == max(first.evaluated, key=lambda choice: sum(choice.ranks))
    assert sum(first.evaluated.values()) <= evaluations and len(set(first.evaluated.values())) == 1
    assert next(iter(first.evaluated)) == space.choice(space.median())
    assert searcher.search(space, again, Random(seed)) == found and list(again.evaluated) == list(first.evaluated)


def test_it_chooses_within_the_parameters() -> None:
    space = space_of(*[5] * 6)
    evaluate = Counter()
    found = Evolutionary(budget=170).search(space, evaluate, Random(0))
    within = [choice for choice in evaluate.evaluated if space.parameters(choice) <= 170]
    assert sum(found.ranks) == max(sum(choice.ranks) for choice in within) and len(within) < len(evaluate.evaluated)
    with pytest.raises(StageError, match="nothing within the budget was evaluated, the smallest has 60 parameters"):
        Evolutionary(budget=59).search(space, Counter(), Random(0))


@pytest.mark.parametrize("seconds", [2, 30])
def test_when_the_time_is_over_the_best_so_far_is_taken(seconds: int) -> None:
    unlimited, limited = Counter(), Counter()
    Evolutionary().search(space_of(*[5] * 6), unlimited, Random(0))
    found = Evolutionary(seconds=seconds).search(space_of(*[5] * 6), limited, Random(0))
    assert list(limited.evaluated) == list(unlimited.evaluated)[:seconds]
    assert sum(found.ranks) == max(sum(choice.ranks) for choice in limited.evaluated)


def test_with_little_time_there_is_one_within_the_budget() -> None:
    space, evaluate = space_of(*[5] * 6), Counter()
    found = Evolutionary(budget=60, seconds=0.1).search(space, evaluate, Random(0))
    assert found == RankConfig((1,) * 6) and list(evaluate.evaluated) == [space.choice(space.median()), found]


def test_it_climbs() -> None:
    """Further than the best of as many random draws comes, which here is five standard deviations away."""
    found = Evolutionary(evaluations=300, samples=1).search(space_of(*[5] * 20), Counter(), Random(0))
    assert sum(found.ranks) > 20 * 3 + 3.5 * (20 * 2) ** 0.5


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqft_search.evolutionary, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"'evolutionary' needs the package optuna: pip install 'sqft\[search\]'"):
        Evolutionary()
