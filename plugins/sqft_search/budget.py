"""Ranks at which least is lost, within a number of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from sqft.api import RankConfig, Searcher, SearchSpace, StageError

UNITS = 1 << 16
"""Units that a budget is divided into at most."""


class Budgeted(Searcher):
    """What the searchers share that estimate what each rank of each group loses."""

    evaluates = False
    budget: int | None = Field(
        None, ge=1, description="the adapter's parameters at most; null: as many as the heuristic's"
    )

    def within_budget(self, space: SearchSpace, losses: Sequence[Sequence[float]]) -> RankConfig:
        """Return the configuration with the least sum of `losses`, given for each group and each of its ranks.

        Raises:
            StageError: when the smallest ranks already have more parameters.
        """
        budget, least = self._budget(space)
        costs = [[group.cost * (rank - min(group.ranks)) for rank in group.ranks] for group in space.groups]
        return space.choice(cheapest(costs, losses, budget - least))

    def heuristic(self, space: SearchSpace) -> RankConfig:
        """Return the heuristic's ranks; where they have too many parameters, the next smaller ones of all groups.

        Raises:
            StageError: as `within_budget`.
        """
        budget, _ = self._budget(space)
        indices = space.median()
        while space.parameters(space.choice(indices)) > budget:
            indices = tuple(min(i + 1, len(g.ranks) - 1) for i, g in zip(indices, space.groups, strict=True))
        return space.choice(indices)

    def _budget(self, space: SearchSpace) -> tuple[int, int]:
        """Return the parameters that are allowed, and those of the smallest ranks."""
        least = space.parameters(RankConfig(tuple(min(group.ranks) for group in space.groups)))
        budget = self.budget or space.parameters(space.choice(space.median()))
        if budget < least:
            raise StageError(f"{self.name}: the smallest ranks have {least} parameters, the budget is {budget}")
        return budget, least


def cheapest(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> tuple[int, ...]:
    """Choose one item of each group so that the sum of losses is least, and that of costs is within the budget.

    This is the knapsack problem with multiple choice, solved by dynamic programming over the budget (Kellerer, Pferschy
    and Pisinger, Knapsack Problems, §11). It is exact where the budget is at most `UNITS` times the common divisor of
    all costs. Beyond that, costs are rounded up to a larger unit: what is chosen is still within the budget, and
    no choice that costs `budget` · (1 − groups / `UNITS`) loses less.

    Args:
        costs: of each group's items; the least of each group is 0.
        losses: of the same items.
        budget: 0 or more.

    Returns:
        An index for each group. Among equal losses, items that cost less.
    """
    import numpy as np

    unit = max(math.gcd(*(cost for group in costs for cost in group)), -(-budget // UNITS), 1)
    size = budget // unit + 1
    least, chosen = np.zeros(size), []  # least[b]: the sum of losses within b units, of the groups so far
    for group, lost in zip(costs, losses, strict=True):
        best, item = np.full(size, np.inf), np.zeros(size, dtype=np.intp)
        for index in sorted(range(len(group)), key=lambda i: (group[i], lost[i])):
            units = -(-group[index] // unit)
            if units < size:
                total = least[: size - units] + lost[index]
                better = total < best[units:]
                best[units:][better], item[units:][better] = total[better], index
        least = best
        chosen.append(item)
    left = int(np.argmin(least))
    indices = []
    for group, item in zip(reversed(costs), reversed(chosen), strict=True):
        indices.append(int(item[left]))
        left -= -(-group[indices[-1]] // unit)
    return tuple(reversed(indices))
