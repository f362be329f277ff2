"""`racing`: hill-climbing that compares configurations on the same records, on as many as it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Self

from pydantic import Field, model_validator

from sqft.api import Evaluate, Indices, RankConfig, Searcher, SearchSpace, TimeLimit


class Racing(Searcher):
    """Hill-climbing by races (after Maron and Moore, Hoeffding Races, 1993) from the heuristic.

    In a race some neighbours of the anchor are compared with it, record by record, on the first `first` records, then
    on twice as many, up to `samples`. A neighbour that is probably worse than the best leaves the race. One that is
    surely better than the anchor becomes the new anchor at once. At the end of the race the best that is left becomes
    the anchor if it is better on these records, but with `cautious` it stays. The search ends when `evaluations` or
    `seconds` are spent, or after `patience` races in a row that moved nothing.

    "Probably" and "surely" are by the one-sided sign-flip test of paired differences: how probable a sum at least as
    far from 0 would be if every difference had a random sign. Each look at a neighbour is a test of its own.
    """

    name = "racing"
    evaluations: int = Field(4096, ge=1, description="records to evaluate at most, over all configurations")
    seconds: TimeLimit = None
    neighbors: int = Field(4, ge=1, description="neighbours in a race")
    step: int = Field(1, ge=1, description="the largest change of a group, in positions of its list of ranks")
    first: int = Field(16, ge=2, description="records at the start of a race")
    samples: int = Field(256, ge=2, description="records at the end of a race")
    surely: float = Field(0.05, gt=0, lt=0.5, description="probability below which a neighbour is surely better")
    probably: float = Field(0.3, gt=0, lt=0.5, description="probability below which a neighbour is probably worse")
    cautious: bool = Field(False, description="move only to neighbours that are surely better")
    patience: int = Field(64, ge=1, description="races in a row without a move, after which the search ends")

    @model_validator(mode="after")
    def _allows_a_race(self) -> Self:
        if self._affordable_neighbors < 1:
            raise ValueError(
                f"evaluations: {self.evaluations} records allow no race, in which two configurations are compared on "
                f"{self._fewest} records or more; give {2 * self._fewest} or more, or lower `first`"
            )
        return self

    @property
    def _fewest(self) -> int:
        """Of records that a race is decided on: fewer than half of `first` would be luck."""
        return min(self.first, self.samples) // 2 + 1

    @property
    def _affordable_neighbors(self) -> int:
        """Neighbours in a race: fewer than `neighbors` where the budget is too small for one race with so many."""
        return min(self.neighbors, self.evaluations // self._fewest - 1)

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        records = _Records(space, evaluate, self.evaluations, self.seconds)
        anchor = space.median()
        visited, still = {anchor}, 0
        while still < self.patience and evaluate.within(self.seconds):
            contenders = space.neighbours(anchor, self.step, self._affordable_neighbors, visited, rng)
            if not contenders:
                break
            winner = self._race(anchor, contenders, records)
            still = 0 if winner else still + 1
            anchor = winner or anchor
        return space.choice(anchor)

    def _race(self, anchor: Indices, contenders: list[Indices], records: _Records) -> Indices | None:
        """Return the contender that becomes the anchor, or None."""
        # Fewer records than `first` only where the budget ends: half of them at least, as on less all is luck.
        first = min(self.first, self.samples, records.most or self.first)
        looked, count, ahead = first // 2, first, dict[Indices, float]()
        while contenders and (count := records.affordable([anchor, *contenders], min(count, self.samples))) > looked:
            if (totals := records.look([anchor, *contenders], count)) is None:
                break  # the time is over
            gains = {c: _differences(totals[anchor], totals[c]) for c in contenders}
            ahead = {c: math.fsum(gains[c]) for c in contenders}
            if sure := [c for c in contenders if by_chance(gains[c]) < self.surely]:
                return max(sure, key=ahead.__getitem__)
            leader = max(contenders, key=ahead.__getitem__)
            best = totals[leader if ahead[leader] > 0 else anchor]
            contenders = [c for c in contenders if by_chance(_differences(totals[c], best)) >= self.probably]
            looked, count = count, 2 * count
        leader = max((c for c in contenders if c in ahead), key=ahead.__getitem__, default=anchor)
        return leader if ahead.get(leader, 0) > 0 and not self.cautious else None


def _differences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [b - a for a, b in zip(before, after, strict=True)]


def by_chance(differences: Sequence[float]) -> float:
    """Return the probability of a sum at least as large, if every difference had a random sign.

    Exact where all differences that are not 0 have one size: then it is the sign test, which for right and wrong
    answers is McNemar's. Otherwise by the normal distribution with the variance of that sum, Σ d².
    """
    moved = [d for d in differences if d]
    if len({abs(d) for d in moved}) <= 1:
        n, gained = len(moved), sum(d > 0 for d in moved)
        return float(sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n)
    return math.erfc(math.fsum(moved) / math.sqrt(2 * math.fsum(d * d for d in moved))) / 2


class _Records:
    """Values of records, counted against a budget, whether they are evaluated now or were by a search that was killed.

    Args:
        space: which the configurations are of.
        evaluate: the function to ask.
        budget: records to ask for at most.
        seconds: after which none are asked for; None is no limit.
    """

    def __init__(self, space: SearchSpace, evaluate: Evaluate, budget: int, seconds: float | None) -> None:
        self.space, self.evaluate, self.left, self.seconds = space, evaluate, budget, seconds
        self.asked: dict[Indices, int] = {}
        self.most: int | None = None

    def affordable(self, configs: Sequence[Indices], count: int) -> int:
        """Return how many of their first records all configurations can be asked for: at most `count`, or all."""
        count = min(count, self.most or count)
        while sum(max(0, count - self.asked.get(config, 0)) for config in configs) > self.left:
            count -= 1
        return count

    def look(self, configs: Sequence[Indices], count: int) -> dict[Indices, list[float]] | None:
        """Return the `totals` of some configurations, or None if the time is over before all were asked for."""
        found: dict[Indices, list[float]] = {}
        for config in configs:
            if not self.evaluate.within(self.seconds):
                return None
            found[config] = self.totals(config, count)
        return found

    def totals(self, config: Indices, count: int) -> list[float]:
        """Return what the first `count` records, or all that there are, contribute to the metric."""
        values = self.evaluate.each(self.space.choice(config), count)
        self.most = len(values) if len(values) < count else self.most
        self.left -= max(0, len(values) - self.asked.get(config, 0))
        self.asked[config] = max(len(values), self.asked.get(config, 0))
        return [value.total for value in values]
