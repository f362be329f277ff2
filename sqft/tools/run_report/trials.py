"""The configurations that a search evaluated: all on the same records, or as in a race each on as many as it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqft.utils.statistics import weighted_mean

MOST_LINES = 6
"""Numbers of records that are told apart; with more, those of an interval are one."""
CHOSEN = "chosen: "
"""Begins the label of the chosen configuration."""
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
    chosen one apart. More than `MOST_LINES` different numbers are put into intervals between powers of two, as wide as
    it takes."""
    of_others = {trial.records for trial in trials if trial.ranks != tuple(chosen)}
    doublings = 0
    while len({_interval(count, doublings) for count in of_others}) > MOST_LINES:
        doublings += 1
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    last: Points = {}
    for place, trial in enumerate(trials, 1):
        point = (place, trial.value, trial.error)
        if trial.ranks == tuple(chosen):
            last[CHOSEN + number_of_records(trial.records)] = [point]
        else:
            found.setdefault(_interval(trial.records, doublings), []).append(point)
    lines = {
        number_of_records(low) if low == high else f"{low:,} to {high:,} records": points
        for (low, high), points in sorted(found.items())
    }
    return lines | last


def number_of_records(count: int) -> str:
    """Return "1 record", "2 records", …"""
    return f"{count:,} record{'s' if count != 1 else ''}"


def _interval(count: int, doublings: int) -> tuple[int, int]:
    """Return the first and last of the numbers that are one with this: of 2^(k · `doublings`) up to the next such."""
    if not doublings:
        return count, count
    first = (count.bit_length() - 1) // doublings * doublings
    return 1 << first, (1 << (first + doublings)) - 1
