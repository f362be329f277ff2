"""Hill-climbing is Algorithm 1; plateaus, ties and exhausted neighbourhoods end well."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_nls.searchers import Heuristic, HillClimbing, Maximal, Minimal, RandomSearch

from sqft.api import RankConfig, RankGroup, SearchSpace


def space_of(*lengths: int) -> SearchSpace:
    return SearchSpace(tuple(RankGroup(f"g{i}", tuple(range(n, 0, -1)), (f"l{i}",)) for i, n in enumerate(lengths)))


class Recorder:
    """An `Evaluate` over a function, remembering what it was asked."""

    def __init__(self, value: object = None) -> None:
        self.value, self.asked = value, list[RankConfig]()
        self.samples: set[int | None] = set()

    def within(self, seconds: float | None) -> bool:
        return seconds is None or len(self.asked) < seconds  # one second each

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float:
        self.asked.append(choice)
        self.samples.add(samples)
        return float(self.value(choice)) if callable(self.value) else 0.0


class Stuck(Random):
    """Draws the same neighbour over and over, so that every other one has to be listed."""

    def randint(self, low: int, high: int) -> int:
        return low

    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        return list(population[:k])

    def choice(self, seq: Any) -> Any:
        return seq[0]


generators = st.builds(lambda kind, seed: kind(seed), st.sampled_from([Random, Stuck]), st.integers(0, 99))


def test_the_fixed_ones() -> None:
    space = space_of(3, 4, 1)
    nothing = Recorder()
    assert Heuristic().search(space, nothing, Random(0)) == RankConfig((2, 3, 1))
    assert Maximal().search(space, nothing, Random(0)) == RankConfig((3, 4, 1))
    assert Minimal().search(space, nothing, Random(0)) == RankConfig((1, 1, 1))
    assert nothing.asked == []


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.integers(0, 99),
    generators,
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 30),
)
def test_algorithm_1(lengths: list[int], seed: int, rng: Random, neighbors: int, step: int, turns: int) -> None:
    """Replay the questions: each turn's are unvisited neighbours of the anchor of Algorithm 1, N if there are."""
    space = space_of(*lengths)
    noise = Random(seed)
    table: dict[RankConfig, float] = {}
    recorder = Recorder(lambda choice: table.setdefault(choice, noise.randrange(4)))
    searcher = HillClimbing(turns=turns, neighbors=neighbors, step=step, samples=7)
    found = searcher.search(space, recorder, rng)
    asked = recorder.asked
    assert asked[0] == Heuristic().search(space, recorder, Random(0))
    assert len(asked) == len(set(asked)) <= 1 + turns * neighbors
    assert recorder.samples == {7}
    anchor, rest = asked[0], asked[1:]
    for _ in range(turns):
        reach = [[r for r in g.ranks if abs(r - a) <= step] for g, a in zip(space.groups, anchor.ranks, strict=True)]
        total = 1
        for options in reach:
            total *= len(options)
        visited = asked[: len(asked) - len(rest)]
        free = total - sum(all(r in o for r, o in zip(v.ranks, reach, strict=True)) for v in visited)
        turn, rest = rest[: min(neighbors, free)], rest[min(neighbors, free) :]
        assert len(turn) == min(neighbors, free)
        for choice in turn:
            assert choice != anchor
            assert all(r in options for r, options in zip(choice.ranks, reach, strict=True))
        if not turn:
            break
        best = max(turn, key=lambda choice: table[choice])
        if table[best] > table[anchor]:
            anchor = best
    assert rest == []
    assert found == anchor


def test_a_plateau_stays_at_the_heuristic() -> None:
    space = space_of(3, 3, 3)
    recorder = Recorder(lambda choice: 0.5)
    assert HillClimbing(turns=3, neighbors=4).search(space, recorder, Random(1)) == RankConfig((2, 2, 2))
    assert len(recorder.asked) == 13


def test_an_exhausted_neighbourhood_ends_the_search() -> None:
    recorder = Recorder(lambda choice: 0.5)
    assert HillClimbing(turns=9, neighbors=5).search(space_of(3), recorder, Random(1)) == RankConfig((2,))
    assert len(recorder.asked) == 3
    recorder = Recorder(lambda choice: 0.5)
    HillClimbing(turns=9, neighbors=5).search(space_of(1, 1), recorder, Random(1))
    assert len(recorder.asked) == 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 50), generators)
def test_every_neighbour_is_found_once(lengths: list[int], step: int, neighbors: int, rng: Random) -> None:
    """On a plateau the anchor stays, and turn after turn the whole neighbourhood is asked about."""
    recorder = Recorder(lambda choice: 0.5)
    searcher = HillClimbing(turns=6**3, neighbors=neighbors, step=step)
    found = searcher.search(space_of(*lengths), recorder, rng)
    every = product(*(range(1, length + 1) for length in lengths))
    near = [RankConfig(r) for r in every if all(abs(a - b) <= step for a, b in zip(r, found.ranks, strict=True))]
    assert sorted(recorder.asked, key=str) == sorted(near, key=str)


def test_what_drawing_misses_is_listed() -> None:
    """The last few of 3⁶ neighbours are drawn too rarely to be met by chance, here after the anchor has moved."""
    recorder = Recorder(lambda choice: choice.ranks.count(1))
    HillClimbing(turns=1000, neighbors=1, step=2).search(space_of(*[3] * 6), recorder, Random(0))
    assert len(recorder.asked) == len(set(recorder.asked)) == 3**6


def test_how_many_groups_move_is_drawn_uniformly() -> None:
    """Then which of them, and then each one's move: here of 4 groups with two moves each."""
    moved, where, draws = Counter[int](), Counter[tuple[int, int]](), 4000
    for seed in range(draws):
        recorder = Recorder()
        HillClimbing(turns=1, neighbors=1).search(space_of(3, 3, 1, 3, 3), recorder, Random(seed))
        changes = [(i, b) for i, (a, b) in enumerate(zip(*(c.ranks for c in recorder.asked), strict=True)) if a != b]
        moved[len(changes)] += 1
        where.update((i, rank) for i, rank in changes)
    assert set(moved) == {1, 2, 3, 4} and len(where) == 8
    # Within five standard deviations: each count has probability 1/4, each place and move 5/8 · 1/2.
    assert all(abs(n - draws / 4) < 5 * math.sqrt(draws * 3 / 16) for n in moved.values())
    assert all(abs(n - draws * 5 / 16) < 5 * math.sqrt(draws * 5 / 16 * 11 / 16) for n in where.values())


def test_ties_go_to_the_first_drawn() -> None:
    recorder = Recorder(lambda choice: choice.ranks != (2, 2, 2))
    found = HillClimbing(turns=1, neighbors=4).search(space_of(3, 3, 3), recorder, Random(3))
    assert found == recorder.asked[1]


def test_it_climbs() -> None:
    space = space_of(*[3] * 6)
    found = HillClimbing(turns=30, neighbors=8).search(space, Recorder(lambda c: sum(c.ranks)), Random(0))
    assert sum(found.ranks) > 12


@pytest.mark.parametrize("seconds", [1, 2, 5, 7, 99])
def test_when_the_time_is_over_the_best_so_far_is_taken(seconds: int) -> None:
    """All that was asked up to then is as without a limit."""
    unlimited, limited = Recorder(lambda c: sum(c.ranks)), Recorder(lambda c: sum(c.ranks))
    HillClimbing(turns=5).search(space_of(3, 3, 3), unlimited, Random(1))
    found = HillClimbing(turns=5, seconds=seconds).search(space_of(3, 3, 3), limited, Random(1))
    assert limited.asked == unlimited.asked[:seconds]
    assert sum(found.ranks) == max(sum(c.ranks) for c in limited.asked)
    some = Recorder(lambda c: -sum(c.ranks))
    assert RandomSearch(seconds=seconds).search(space_of(3, 3, 3), some, Random(1)) in some.asked
    assert len(some.asked) == min(seconds, 8)


@pytest.mark.parametrize("seed", range(5))
def test_random_returns_the_best_it_asked(seed: int) -> None:
    recorder = Recorder(lambda choice: -sum(choice.ranks))
    found = RandomSearch(trials=6).search(space_of(3, 3, 3), recorder, Random(seed))
    assert found == min(recorder.asked, key=lambda choice: sum(choice.ranks))
    assert len(recorder.asked) == 6
    few = Recorder()
    RandomSearch(trials=6).search(space_of(2), few, Random(seed))
    assert len(few.asked) == 2
