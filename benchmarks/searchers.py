"""Searchers on a synthetic landscape: the quality that each finds, by the number of records that it evaluates.

    python benchmarks/searchers.py [--seeds 10] [--budgets 832 3328 13312] [--gains 0.25 1.0] [--only racing]
    python benchmarks/searchers.py --training [--seeds 20] [--steps 170 1000 3000]

The landscape has groups of five ranks, and its best configuration is known: one rank for each group, drawn at random.
Each step away from it costs utility, in each group another amount, and utility is rounded to plateaus. The answer to a
record is right when utility + a difficulty that all configurations share + noise of this configuration and record alone
is above 0. So configurations agree on most records, as sub-adapters of one adapter do. The quality of a configuration
is the probability of a right answer, in closed form: no sample decides who is better. `gain` is the utility that
separates the heuristic from the best.

A budget counts pairs of a configuration and a record, each once. Algorithm 1 draws four neighbours a turn, as often as
its budget lasts; 832 records are its default of 3 turns and 64 samples. Searchers may spend less.

`--training` asks what `loss-guided` finds, which evaluates nothing, if the losses of training followed the landscape.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from random import Random

import numpy as np
from sqft_nls.searchers import HillClimbing, RandomSearch
from sqft_search.evolutionary import Evolutionary
from sqft_search.loss_guided import LossGuided
from sqft_search.racing import Racing

from sqft.api import RankConfig, RankGroup, RecordValue, Searcher, SearchSpace, TrainingStep

GROUPS, RANKS, RECORDS = 24, (40, 32, 24, 16, 8), 1024
OWN_NOISE = 0.1
"""Share of the variance that is a configuration's own: two equal ones disagree on a seventh of the records."""
PLATEAUS = 8
"""Between the heuristic and the best."""
BATCH = 16
"""Records of a training step."""
OFFSET = 0.25
"""The best one's distance to 0, in standard deviations: it is right on 60 % of the records."""


class Landscape:
    """`sqft.api.Evaluate` on drawn answers; `evaluated` counts the records of each configuration."""

    def __init__(self, seed: int, gain: float, steps: int = 0) -> None:
        draws = np.random.default_rng(seed)
        groups = (RankGroup(f"group {i}", RANKS, (f"layer {i}",), cost=1) for i in range(GROUPS))
        self.space, self.seed, self.steps, self.plateau = SearchSpace(tuple(groups)), seed, steps, gain / PLATEAUS
        self.best: list[int] = draws.integers(0, len(RANKS), GROUPS).tolist()
        weights = draws.exponential(1, GROUPS)
        away = np.abs(np.subtract(self.space.median(), self.best)) @ weights
        self.weights = weights * gain / away
        self.difficulty = draws.normal(0, math.sqrt(1 - OWN_NOISE), RECORDS)
        self.answers: dict[RankConfig, list[RecordValue]] = {}
        self.evaluated: dict[RankConfig, int] = {}

    def utility(self, choice: RankConfig) -> float:
        away: float = np.abs(np.subtract([RANKS.index(rank) for rank in choice.ranks], self.best)) @ self.weights
        return OFFSET - math.floor(away / self.plateau + 0.5) * self.plateau

    def quality(self, choice: RankConfig) -> float:
        return statistics.NormalDist().cdf(self.utility(choice))

    def each(self, choice: RankConfig, samples: int | None = None) -> list[RecordValue]:
        count = min(samples or RECORDS, RECORDS)
        self.evaluated[choice] = max(count, self.evaluated.get(choice, 0))
        if choice not in self.answers:
            own = np.random.default_rng([self.seed, *choice.ranks]).normal(0, math.sqrt(OWN_NOISE), RECORDS)
            right = self.utility(choice) + self.difficulty + own > 0
            self.answers[choice] = [RecordValue(float(answer), 1) for answer in right]
        return self.answers[choice][:count]

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float:
        return statistics.fmean(value.total for value in self.each(choice, samples))

    def within(self, seconds: float | None) -> bool:
        return True

    def first_order(self, samples: int | None = None) -> list[list[float]]:
        raise NotImplementedError("right and wrong answers have no gradient")

    def training(self) -> list[TrainingStep]:
        """Return made-up training: each step draws a rank for every group, and its loss is minus the mean margin of 16
        records. What ranks decide of it grows, as deltas do, in the first half of the steps. The loss keeps falling."""
        draws = Random(f"{self.seed} {self.steps}")
        found = []
        for step in range(self.steps):
            config = self.space.choice([draws.randrange(len(RANKS)) for _ in range(GROUPS)])
            margin = min(1, 2 * step / self.steps) * self.utility(config) + draws.gauss(0, 1 / math.sqrt(BATCH))
            found.append(TrainingStep(config, math.exp(-3 * step / self.steps) - margin))
        return found


SEARCHERS: dict[str, Callable[[int], Searcher]] = {
    "`random`, 64 samples": lambda budget: RandomSearch(trials=budget // 64),
    "`hill-climbing` (Algorithm 1), 64 samples": lambda budget: HillClimbing(turns=(budget // 64 - 1) // 4),
    "`hill-climbing`, 160 samples": lambda budget: HillClimbing(turns=(budget // 160 - 1) // 4, samples=160),
    "`racing`": lambda budget: Racing(evaluations=budget),
    "`racing`, cautious": lambda budget: Racing(evaluations=budget, cautious=True),
    "`evolutionary`, 64 samples": lambda budget: Evolutionary(evaluations=budget),
}


def gained(searcher: Searcher, landscape: Landscape) -> float:
    """Return the quality above the heuristic's that one search found."""
    found = searcher.search(landscape.space, landscape, Random(landscape.seed))
    heuristic = landscape.space.choice(landscape.space.median())
    return landscape.quality(found) - landscape.quality(heuristic)


def table(gain: float, budgets: list[int], seeds: int, only: str) -> list[str]:
    """Return a table of the mean quality above the heuristic's, its standard error over seeds, and the mean of the
    records that were evaluated; of searchers whose name has `only` in it."""
    landscape = Landscape(0, gain)  # the two are alike for every seed
    start, best = (landscape.quality(landscape.space.choice(c)) for c in (landscape.space.median(), landscape.best))
    lines = [
        f"Gain {gain}: the heuristic is right on {start:.1%} of the records, the best on {best:.1%}.",
        "",
        f"| searcher | {' | '.join(f'{budget:,} records' for budget in budgets)} |",
        f"|---|{'---|' * len(budgets)}",
    ]
    for name, searcher in ((name, searcher) for name, searcher in SEARCHERS.items() if only in name):
        cells = []
        for budget in budgets:
            landscapes = [Landscape(seed, gain) for seed in range(seeds)]
            gains = [gained(searcher(budget), one) for one in landscapes]
            records = statistics.fmean(sum(one.evaluated.values()) for one in landscapes)
            cells.append(f"{mean_gain(gains)} ({records:,.0f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def mean_gain(gains: Sequence[float]) -> str:
    """Return the mean and its standard error, in percentage points."""
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
    return f"{100 * statistics.fmean(gains):+.2f} ± {100 * error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budgets", type=int, nargs="+", default=[832, 3328, 13312])
    parser.add_argument("--gains", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--only", default="", help="a part of the searchers' names")
    parser.add_argument("--training", action="store_true", help="loss-guided, in place of searchers that evaluate")
    parser.add_argument("--steps", type=int, nargs="+", default=[170, 1000, 3000], help="of training")
    arguments = parser.parse_args()
    for gain in arguments.gains:
        if arguments.training:
            for steps, significance in product(arguments.steps, (0.05, 1.0)):
                searcher = LossGuided(budget=GROUPS * max(RANKS), significance=significance)  # all that there are
                gains = [gained(searcher, Landscape(seed, gain, steps)) for seed in range(arguments.seeds)]
                how = f"significance {significance}, {sum(map(bool, gains))} times another quality"
                print(f"Gain {gain}, {steps:,} steps, {how}: {mean_gain(gains)}", flush=True)
            continue
        print("\n".join(table(gain, arguments.budgets, arguments.seeds, arguments.only)), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
