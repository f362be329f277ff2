"""Two models on the same items: how much one is better, and whether that could be chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqft.tools.run_report.facts import RunFacts
from sqft.utils.significance import bootstrap_interval, mcnemar
from sqft.utils.statistics import paired_difference


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
    """Where the difference lies in 95 of 100 draws of the items; for a text, ± 1.96 standard errors over windows."""
    only_first: int | None = None
    """How many items only the first answers right; None where answers are not right or wrong."""
    only_second: int | None = None
    p: float | None = None
    """McNemar's exact test that both answer equally well."""

    @property
    def differs(self) -> bool:
        """Whether 0 is outside the interval."""
        return not self.interval[0] <= 0 <= self.interval[1]

    def cells(self) -> list[str]:
        """Return the comparison as text: cells under `HEADS`."""
        unit = " %" if self.measure.startswith("perplexity") else " points"
        low, high = map(_signed, self.interval)
        answers = "–" if self.p is None else f"+{self.only_second:,} −{self.only_first:,} of {self.items:,}"
        p = "–" if self.p is None else f"{self.p:.2g}"
        difference = f"{_signed(self.difference)}{unit}"
        return [self.second, self.first, self.measure, difference, f"{low} to {high}", answers, p]


HEADS = ["model", "less", "measure", "difference", "95 % interval", "only it, only the other is right", "p"]


def comparisons(runs: Sequence[RunFacts]) -> Iterator[Comparison]:
    """Compare each configuration with the same one of the first run; in one run alone, its last model with all others.

    Only items that both answered count. Measures that share no items are left out.
    """
    first = runs[0]
    if len(runs) == 1:
        *others, last = [*first.texts()] or [""]
        for other in others:
            yield from _compare((first, other, other), (first, last, last))
    for run in runs[1:]:
        for configuration in run.texts():
            if configuration in first.texts():
                names = (f"{one.name}: {configuration}" for one in (first, run))
                yield from _compare((first, configuration, next(names)), (run, configuration, next(names)))


def _compare(one: tuple[RunFacts, str, str], other: tuple[RunFacts, str, str]) -> Iterator[Comparison]:
    """Compare two configurations (run, configuration, label) on every measure that both have."""
    (first_run, first, first_label), (second_run, second, second_label) = one, other
    before, after = first_run.answers.get(first, {}), second_run.answers.get(second, {})
    for measure in (name for name in before if name in after):
        if found := compare_answers(before[measure], after[measure]):
            yield Comparison(first_label, second_label, measure, *found)
    texts = first_run.texts().get(first, {}), second_run.texts().get(second, {})
    for role in (role for role in texts[0] if role in texts[1]):
        try:
            mean, error = paired_difference(texts[0][role], texts[1][role])
        except ValueError:
            continue  # other windows
        if error is not None:
            interval = math.expm1(mean - 1.96 * error), math.expm1(mean + 1.96 * error)
            windows = len(texts[0][role]["windows"])
            label = "perplexity" if len(texts[0]) == 1 else f"perplexity {role}"
            yield Comparison(first_label, second_label, label, windows, math.expm1(mean), interval)


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


def _signed(share: float) -> str:
    """Return a share in hundredths, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")
