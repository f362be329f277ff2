"""Races: the test against all signs, the budget, what moves the anchor, and what a killed search asks again."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqft_search.racing import Racing, by_chance

from sqft.api import RankConfig, RankGroup, RecordValue, SearchSpace

RECORDS = 100


def space_of(*lengths: int) -> SearchSpace:
    return SearchSpace(tuple(RankGroup(f"g{i}", tuple(range(n, 0, -1)), (f"l{i}",)) for i, n in enumerate(lengths)))


class Recorder:
    """An `Evaluate` by a function of configuration and record; it remembers how many of each were asked for."""

    def __init__(self, value: Callable[[RankConfig, int], float]) -> None:
        self.value, self.questions = value, list[tuple[RankConfig, int]]()

    def each(self, choice: RankConfig, samples: int | None = None) -> list[RecordValue]:
        assert samples
        self.questions.append((choice, samples))
        return [RecordValue(self.value(choice, record), 1) for record in range(min(samples, RECORDS))]

    def within(self, seconds: float | None) -> bool:
        return seconds is None or len(self.questions) < seconds  # one second each

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float:
        raise AssertionError("it compares record by record")

    @property
    def evaluated(self) -> dict[RankConfig, int]:
        return {choice: min(samples, RECORDS) for choice, samples in sorted(self.questions, key=lambda q: q[1])}


def noisy(choice: RankConfig, record: int) -> float:
    """Better with larger ranks, on most records."""
    return float(Random(f"{choice} {record}").random() < sum(choice.ranks) / 40)


@given(st.lists(st.integers(-1, 1), max_size=10))
def test_of_equal_sizes_the_probability_is_that_over_all_signs(differences: list[int]) -> None:
    moved = [d for d in differences if d]
    sums = [sum(s * d for s, d in zip(signs, moved, strict=True)) for signs in product((-1, 1), repeat=len(moved))]
    assert by_chance(differences) == pytest.approx(sum(s >= sum(moved) for s in sums) / len(sums))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_of_others_it_is_near_that(seed: int) -> None:
    """The farthest of these thousand is 0.053 away."""
    draws = Random(seed)
    differences = [draws.gauss(0.3, 1) for _ in range(12)]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((-1, 1), repeat=12)]
    assert by_chance(differences) == pytest.approx(sum(s >= sum(differences) for s in sums) / len(sums), abs=0.054)


def test_no_difference_proves_nothing() -> None:
    assert by_chance([0.0] * 9) == by_chance([]) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 99), st.integers(18, 3000), st.booleans())
def test_the_budget_holds_and_the_search_is_seeded(lengths: list[int], seed: int, budget: int, cautious: bool) -> None:
    space, searcher = space_of(*lengths), Racing(evaluations=budget, cautious=cautious)
    first, again = Recorder(noisy), Recorder(noisy)
    found = searcher.search(space, first, Random(seed))
    assert found in space and sum(first.evaluated.values()) <= budget
    assert searcher.search(space, again, Random(seed)) == found and again.questions == first.questions


@pytest.mark.parametrize(("options", "least"), [({}, 18), ({"neighbors": 1}, 18), ({"samples": 4}, 6)])
def test_a_budget_that_allows_no_race(options: dict[str, int], least: int) -> None:
    Racing(evaluations=least, **options)
    with pytest.raises(ValidationError, match=f"evaluations: {least - 1} records allow no race.*give {least} or more"):
        Racing(evaluations=least - 1, **options)


@pytest.mark.parametrize(("budget", "neighbours"), [(18, 1), (30, 2), (45, 4), (44, 3)])
def test_a_small_budget_is_spent_on_fewer_neighbours(budget: int, neighbours: int) -> None:
    recorder = Recorder(lambda choice, record: 0.5)
    Racing(evaluations=budget).search(space_of(3, 3, 3), recorder, Random(0))
    assert len(recorder.evaluated) == 1 + neighbours and sum(recorder.evaluated.values()) <= budget
    assert min(recorder.evaluated.values()) >= 9


def test_a_better_neighbour_wins_on_few_records() -> None:
    """Each step up is right on every record, each step down on none: nothing needs more than the first records."""
    recorder = Recorder(lambda choice, record: float(sum(choice.ranks)))
    found = Racing(evaluations=4000, patience=20).search(space_of(3, 3, 3), recorder, Random(0))
    assert found == RankConfig((3, 3, 3))
    losers = {choice: n for choice, n in recorder.evaluated.items() if sum(choice.ranks) < 6}
    assert losers and set(losers.values()) == {16}


def test_alike_on_all_records_nothing_moves() -> None:
    recorder = Recorder(lambda choice, record: 0.5)
    assert Racing(patience=1).search(space_of(3, 3, 3), recorder, Random(0)) == RankConfig((2, 2, 2))
    assert set(recorder.evaluated.values()) == {RECORDS} and len(recorder.evaluated) == 5  # one race to its end


@pytest.mark.parametrize("cautious", [True, False])
def test_what_is_better_but_not_surely(cautious: bool) -> None:
    """Two more right answers on all records are one of four outcomes by chance."""
    recorder = Recorder(lambda choice, record: float(choice.ranks == (1,) and record in (0, 60)))
    expected = RankConfig((2,) if cautious else (1,))
    assert Racing(cautious=cautious).search(space_of(2), recorder, Random(0)) == expected


def test_worse_ones_leave_early() -> None:
    """A neighbour that loses a record in two leaves after the first look."""
    recorder = Recorder(lambda choice, record: -float(record % 2) * (choice.ranks != (2, 2)))
    Racing(neighbors=1, patience=1).search(space_of(3, 3), recorder, Random(0))
    assert set(recorder.evaluated.values()) == {16}


def test_the_last_race_looks_at_what_the_budget_leaves() -> None:
    """Of 2 configurations 16 records each, then 32, and then not 64 but 45."""
    recorder = Recorder(lambda choice, record: 0.5)
    Racing(evaluations=91, neighbors=1).search(space_of(2), recorder, Random(0))
    assert list(recorder.evaluated.values()) == [45, 45]


@pytest.mark.parametrize("seconds", [1, 5, 12, 40])
def test_nothing_begins_when_the_time_is_over(seconds: int) -> None:
    """Up to then all is as without a limit; a look that is cut short decides nothing."""
    unlimited, limited = Recorder(noisy), Recorder(noisy)
    Racing(patience=9).search(space_of(3, 3, 3), unlimited, Random(1))
    found = Racing(patience=9, seconds=seconds).search(space_of(3, 3, 3), limited, Random(1))
    assert limited.questions == unlimited.questions[:seconds]
    assert found in limited.evaluated and (seconds > 5 or found == RankConfig((2, 2, 2)))


def test_those_who_are_probably_worse_than_the_best_leave() -> None:
    """The largest rank is right twice as often as the middle one, too seldom to be surely better at once."""
    right = {3: (0, 1, 2, 3), 2: (), 1: (4,)}
    recorder = Recorder(lambda choice, record: float(record in right[choice.ranks[0]]))
    found = Racing(neighbors=2, patience=1).search(space_of(3), recorder, Random(0))
    assert found == RankConfig((3,)) and recorder.evaluated[RankConfig((1,))] == 16


def test_what_drawing_misses_is_listed() -> None:
    """The last few of 3⁶ neighbours are drawn too rarely to be met by chance."""
    recorder = Recorder(lambda choice, record: 0.5)
    Racing(evaluations=10**6, neighbors=1, samples=2, patience=1000).search(space_of(*[3] * 6), recorder, Random(0))
    assert len(recorder.evaluated) == 3**6


def test_without_choice_it_asks_nothing() -> None:
    recorder = Recorder(noisy)
    assert Racing().search(space_of(1, 1), recorder, Random(0)) == RankConfig((1, 1)) and not recorder.questions


def test_chance_rarely_moves_a_cautious_search() -> None:
    """Of neighbours that are as good as the anchor; each race has four, at up to four looks."""
    moved = 0
    for seed in range(20):
        recorder = Recorder(lambda choice, record, seed=seed: float(Random(f"{seed} {choice} {record}").random() < 0.5))
        searcher = Racing(cautious=True, patience=1, surely=0.005)
        moved += searcher.search(space_of(3, 3, 3), recorder, Random(seed)) != RankConfig((2, 2, 2))
    assert moved <= 20 * 0.08 + 4 * math.sqrt(20 * 0.08)


@pytest.mark.parametrize("samples", [2, 8])
def test_short_races_are_run_too(samples: int) -> None:
    """The first look is at no more records than a race may have."""
    recorder = Recorder(lambda choice, record: float(sum(choice.ranks)))
    found = Racing(samples=samples, patience=20).search(space_of(3, 3), recorder, Random(0))
    assert found == RankConfig((3, 3)) and set(recorder.evaluated.values()) == {samples}
