"""Two models on the same items: how much one is better, and whether that could be chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqft.tools.run_report.facts import Measure, RunFacts
from sqft.utils.significance import LEVEL, bootstrap_interval, mcnemar, t_quantile
from sqft.utils.statistics import paired_difference
from sqft.utils.text import signed_percent


@dataclass(frozen=True)
class Comparison:
    """What `second` gives on a measure, less what `first` gives on the same items."""

    first: str
    second: str
    measure: str
    items: int
    difference: float
    """A share of right answers, or for a text the ratio of perplexities less 1."""
    interval: tuple[float, float]
    """Where the difference lies in 95 of 100 draws of the items; for a text, by Student's t over its windows."""
    only_first: int | None = None
    """How many items only the first answers right; None where answers are not right or wrong."""
    only_second: int | None = None
    p: float | None = None
    """McNemar's exact test that both answer equally well."""

    @property
    def differs(self) -> bool:
        """Whether 0 is outside the interval, and of right and wrong answers p is below 0.05 too."""
        return not self.interval[0] <= 0 <= self.interval[1] and (self.p is None or self.p < 1 - LEVEL)

    def cells(self) -> list[str]:
        """Return the comparison as text: cells under `HEADS`."""
        unit = " %" if self.measure.startswith("perplexity") else " points"
        low, high = map(signed_percent, self.interval)
        answers = "–" if self.p is None else f"+{self.only_second:,} −{self.only_first:,} of {self.items:,}"
        p = "–" if self.p is None else f"{self.p:.2g}"
        difference = f"{signed_percent(self.difference)}{unit}"
        return [self.second, self.first, self.measure, difference, f"{low} to {high}", answers, p]


HEADS = ["model", "less", "measure", "difference", "95 % interval", "only it, only the other is right", "p"]


def comparisons(runs: Sequence[RunFacts]) -> Iterator[Comparison]:
    """Compare each configuration with the same one of the first run; in one run alone, its last model with all others.

    Only items that both answered count, under the same rules: the settings of `exact_match` or of lm-eval; of a text,
    its content, the windows and the model's own path, on which the tokens depend.
    """
    first = runs[0]
    if len(runs) == 1:
        *others, last = [*first.measures] or [""]
        for other in others:
            yield from _compare(first.measures[other], first.measures[last], other, last)
    for run in runs[1:]:
        for name in run.measures:
            if name in first.measures:
                labels = f"{first.name}: {name}", f"{run.name}: {name}"
                yield from _compare(first.measures[name], run.measures[name], *labels)


def _compare(first: Sequence[Measure], second: Sequence[Measure], one: str, other: str) -> Iterator[Comparison]:
    """Compare two configurations on every measure that both have under the same rules."""
    known = {measure.rules: measure for measure in first}
    for after in (measure for measure in second if measure.rules in known):
        before = known[after.rules]
        if after.windows:
            mean, error = paired_difference(before.windows, after.windows)
            windows = len(after.windows["windows"])
            if error is not None:
                half = t_quantile(windows - 1) * error
                interval = math.expm1(mean - half), math.expm1(mean + half)
                yield Comparison(one, other, after.name, windows, math.expm1(mean), interval)
        elif found := compare_answers(before.answers, after.answers):
            yield Comparison(one, other, after.name, *found)


def compare_answers(
    before: Mapping[str, float], after: Mapping[str, float]
) -> tuple[int, float, tuple[float, float], int | None, int | None, float | None] | None:
    """Return items, mean difference, its interval, and for right and wrong answers the two counts and McNemar's p.

    None when the two share no item.
    """
    items = [item for item in before if item in after]
    if not items:
        return None
    differences = [after[item] - before[item] for item in items]
    interval, mean = bootstrap_interval(differences), math.fsum(differences) / len(items)
    if not {*before.values(), *after.values()} <= {0.0, 1.0}:
        return len(items), mean, interval, None, None, None
    only_first, only_second = differences.count(-1.0), differences.count(1.0)
    return len(items), mean, interval, only_first, only_second, mcnemar(only_first, only_second)
