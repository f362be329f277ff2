"""Searchers over the ranks of an elastic adapter (paper §2.2 and Algorithm 1)."""

from __future__ import annotations

from random import Random

from pydantic import Field

from sqft.api import Evaluate, Indices, RankConfig, Searcher, SearchSpace, TimeLimit


class Heuristic(Searcher):
    """The median rank of every group; no evaluation."""

    name = "heuristic"
    evaluates = False

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        return space.choice(space.median())


class Maximal(Searcher):
    """The largest rank of every group; no evaluation."""

    name = "maximal"
    evaluates = False

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        return RankConfig(tuple(max(group.ranks) for group in space.groups))


class Minimal(Searcher):
    """The smallest rank of every group; no evaluation."""

    name = "minimal"
    evaluates = False

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        return RankConfig(tuple(min(group.ranks) for group in space.groups))


class RandomSearch(Searcher):
    """The best of the heuristic and of rank configurations drawn uniformly."""

    name = "random"
    trials: int = Field(8, ge=1, description="number of configurations to evaluate, including the heuristic")
    samples: int | None = Field(64, ge=1, description="number of validation records; null uses all")
    seconds: TimeLimit = None

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        tried = [space.median()]
        for _ in range(100 * self.trials):  # a small space may not hold so many different ones
            if len(tried) == self.trials:
                break
            drawn = tuple(rng.randrange(len(group.ranks)) for group in space.groups)
            if drawn not in tried:
                tried.append(drawn)
        values = {c: evaluate(c, self.samples) for c in map(space.choice, tried) if evaluate.within(self.seconds)}
        return max(values, key=values.__getitem__)


class HillClimbing(Searcher):
    """Algorithm 1: start at the heuristic, and move to the best of some unvisited neighbours if it is better.

    Each turn draws up to `neighbors` configurations that were never visited (`SearchSpace.neighbours`). When no
    unvisited neighbour is left, the search ends. The anchor moves only to a strictly better neighbour; among equals, to
    the one that was drawn first.
    """

    name = "hill-climbing"
    turns: int = Field(3, ge=1, description="T of Algorithm 1: how often neighbours are drawn")
    neighbors: int = Field(4, ge=1, description="N of Algorithm 1: how many neighbours are evaluated in each turn")
    step: int = Field(
        1, ge=1, description="S of Algorithm 1: the largest change of a group, in positions of its list of ranks"
    )
    samples: int | None = Field(64, ge=1, description="M of Algorithm 1: number of validation records; null uses all")
    seconds: TimeLimit = None

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        def accuracy(indices: Indices) -> float:
            return evaluate(space.choice(indices), self.samples)

        anchor = space.median()
        visited = {anchor}
        best = accuracy(anchor)
        for _ in range(self.turns):
            neighbours = space.neighbours(anchor, self.step, self.neighbors, visited, rng)
            values = [accuracy(neighbour) for neighbour in neighbours if evaluate.within(self.seconds)]
            if not values:
                break
            if max(values) > best:
                best = max(values)
                anchor = neighbours[values.index(best)]
        return space.choice(anchor)
