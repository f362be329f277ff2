"""Searchers over the ranks of an elastic adapter (paper §2.2 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product
from random import Random

from pydantic import Field

from sqft.api import Evaluate, RankConfig, Searcher, SearchSpace

Indices = tuple[int, ...]
"""A rank configuration, as a position in each group's list of ranks."""


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

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        tried = [space.median()]
        for _ in range(100 * self.trials):  # a small space may not hold so many different ones
            if len(tried) == self.trials:
                break
            drawn = tuple(rng.randrange(len(group.ranks)) for group in space.groups)
            if drawn not in tried:
                tried.append(drawn)
        return max(map(space.choice, tried), key=lambda choice: evaluate(choice, self.samples))


class HillClimbing(Searcher):
    """Algorithm 1: start at the heuristic, and move to the best of some unvisited neighbours if it is better.

    A neighbour differs from the anchor in one or more groups, each by at most `step` positions in its list.
    First the number of groups that change is drawn, uniformly from 1 to all that can change. Then the groups
    are drawn, and then a change for each, uniformly from its non-zero ones. Each turn draws up to `neighbors`
    configurations that were never visited. If drawing finds none, all neighbours are listed in order. When
    no unvisited neighbour is left, the search ends. The anchor moves only to a strictly better neighbour;
    among equals, to the one that was drawn first.
    """

    name = "hill-climbing"
    turns: int = Field(3, ge=1, description="T of Algorithm 1: how often neighbours are drawn")
    neighbors: int = Field(4, ge=1, description="N of Algorithm 1: how many neighbours are evaluated in each turn")
    step: int = Field(
        1, ge=1, description="S of Algorithm 1: the largest change of a group, in positions of its list of ranks"
    )
    samples: int | None = Field(64, ge=1, description="M of Algorithm 1: number of validation records; null uses all")

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        def accuracy(indices: Indices) -> float:
            return evaluate(space.choice(indices), self.samples)

        anchor = space.median()
        visited = {anchor}
        best = accuracy(anchor)
        for _ in range(self.turns):
            neighbours = self._draw(space, anchor, visited, rng)
            if not neighbours:
                break
            values = [accuracy(neighbour) for neighbour in neighbours]
            if max(values) > best:
                best = max(values)
                anchor = neighbours[values.index(best)]
        return space.choice(anchor)

    def _draw(self, space: SearchSpace, anchor: Indices, visited: set[Indices], rng: Random) -> list[Indices]:
        """Return up to `neighbors` unvisited neighbours, and mark them as visited."""
        moves = [self._moves(index, len(group.ranks)) for index, group in zip(anchor, space.groups, strict=True)]
        # The list of all can be very long, but it is left early: only visited configurations are passed over.
        listed = product(*((index, *moved) for index, moved in zip(anchor, moves, strict=True)))
        drawn: list[Indices] = []
        for candidate in chain(self._at_random(anchor, moves, rng), listed):
            if candidate not in visited:
                visited.add(candidate)
                drawn.append(candidate)
                if len(drawn) == self.neighbors:
                    break
        return drawn

    def _at_random(self, anchor: Indices, moves: list[list[int]], rng: Random) -> Iterator[Indices]:
        """Draw neighbours, the same one again perhaps, at most 64 for each that is wanted."""
        movable = [position for position, moved in enumerate(moves) if moved]
        for _ in range(64 * self.neighbors if movable else 0):
            moving = set(rng.sample(movable, rng.randint(1, len(movable))))
            yield tuple(rng.choice(moves[i]) if i in moving else index for i, index in enumerate(anchor))

    def _moves(self, index: int, length: int) -> list[int]:
        low, high = max(0, index - self.step), min(length - 1, index + self.step)
        return [other for other in range(low, high + 1) if other != index]
