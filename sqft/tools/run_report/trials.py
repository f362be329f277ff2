"""The configurations that a search evaluated: all on the same records, or as in a race each on as many as it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqft.utils.statistics import weighted_mean

MOST_LINES = 6
"""Numbers of records that are told apart; with more, those between two powers of two are one."""
Points = dict[str, list[tuple[float, float, float]]]
"""Points (x, y, standard error of y), by their label."""


@dataclass(frozen=True)
class Trial:
    """A configuration with its value on all records that it was evaluated on."""

    ranks: tuple[int, ...]
    records: int
    value: float
    error: float
    """The standard error of the value by the spread of the records; 0 where it is not known."""


def read_trials(lines: Iterable[Mapping[str, Any]]) -> list[Trial]:
    """Return each configuration of `trials.jsonl` once, in the order in which they were first evaluated.

    A line has the values of those records that were new.
    """
    found: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(tuple(line["ranks"]), []).append(line)
    return [_trial(ranks, own) for ranks, own in found.items()]


def _trial(ranks: tuple[int, ...], lines: Sequence[Mapping[str, Any]]) -> Trial:
    records = [
        (total / weight, weight)
        for line in lines
        for total, weight in zip(line.get("totals", ()), line.get("weights", ()), strict=True)
        if weight
    ]
    error = weighted_mean(*zip(*records, strict=True))[1] if records else None
    return Trial(ranks, int(lines[-1]["samples"]), float(lines[-1]["value"]), error or 0.0)


def in_order(trials: Sequence[Trial]) -> dict[str, list[tuple[float, float]]]:
    """Return the value of each trial and the best one so far, of trials that share their records."""
    values = [trial.value for trial in trials]
    return {"trial": list(enumerate(values, 1)), "best so far": list(enumerate(accumulate(values, max), 1))}


def by_records(trials: Sequence[Trial], chosen: Sequence[int]) -> Points:
    """Return the value of each trial by its place in the order, those on as many records together, fewest first; the
    chosen one apart."""
    counts = {trial.records for trial in trials}
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    last: Points = {}
    for place, trial in enumerate(trials, 1):
        point = (place, trial.value, trial.error)
        if trial.ranks == tuple(chosen):
            last[f"chosen: {trial.records:,} records"] = [point]
        else:
            least = 1 << (trial.records.bit_length() - 1)
            between = (least, 2 * least - 1) if len(counts) > MOST_LINES else (trial.records, trial.records)
            found.setdefault(between, []).append(point)
    lines = {
        f"{low:,} records" if low == high else f"{low:,} to {high:,} records": points
        for (low, high), points in sorted(found.items())
    }
    return lines | last
