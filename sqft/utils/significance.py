"""Whether two models differ by more than chance, on the same items."""

from __future__ import annotations

from collections.abc import Sequence

LEVEL, DRAWS, CHUNK = 0.95, 10_000, 100
"""Of a bootstrap interval: how often it should hold, how many times the items are drawn, how many draws at once."""


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value that two models answer equally well, by McNemar's exact test (1947).

    Args:
        only_first: how many items only the first model answers right.
        only_second: how many only the second does. Items on which both agree say nothing.
    """
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0


def t_quantile(freedom: int) -> float:
    """Return how many standard errors of a mean reach to either end of its 95 % interval (Student's t)."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, freedom))


def bootstrap_interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return between which values the mean difference lies, by drawing the items again (percentile bootstrap, Efron
    1979), in 95 of 100 cases.

    Args:
        differences: what each item gives in the second model less what the same item gives in the first.
        seed: of the draws.
    """
    import numpy

    values, counts = numpy.unique(numpy.asarray(differences, dtype=float), return_counts=True)
    generator, n = numpy.random.default_rng(seed), len(differences)
    means = [generator.multinomial(n, counts / n, size=CHUNK) @ values / n for _ in range(DRAWS // CHUNK)]
    low, high = numpy.quantile(numpy.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
