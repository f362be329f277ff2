"""The charts of a sweep as data: a measure along an axis of numbers, a line for each combination of the other axes."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqft.recipe.stages import EVALUABLE
from sqft.tools.sweep.definition import SEED

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """What the cells measured that differ in their seed alone.

    Args:
        x: the place on the axis.
        values: of each seed.
        error: the standard error of the only value; 0 where there are several, or where it is not known.
    """

    x: float
    values: tuple[float, ...]
    error: float = 0.0


@dataclass(frozen=True)
class Lines:
    """A chart: points by the label of their line, and the cells that have none."""

    points: Mapping[str, Sequence[Point]]
    left_out: tuple[str, ...] = ()

    def bars(self) -> dict[str, list[tuple[float, float, float]]]:
        """Return each point as (x, mean, length of its bar): all bars of a chart are of one kind, see `caption`."""
        return {
            label: [(p.x, statistics.fmean(p.values), self._bar(p)) for p in own] for label, own in self.points.items()
        }

    def caption(self) -> str:
        """Return what is drawn, in words."""
        least, most = min(self._seeds()), max(self._seeds())
        if most > 1:
            said = f"Means over {least} to {most} seeds" if least < most else f"Means over {most} seeds"
            said += ", with their standard deviation" + (" (none for a single seed)." if least == 1 else ".")
        elif all(point.error for _, own in self.points.items() for point in own):
            said = "One seed, with the standard error of the measure."
        elif any(point.error for _, own in self.points.items() for point in own):
            said = "One seed, with the standard error of the measure where it is known."
        else:
            said = "One seed; errors are not known."
        only = f"Of {next(iter(self.points))}. " if len(self.points) == 1 else ""
        return only + said + (f" Not drawn: {'; '.join(self.left_out)}." if self.left_out else "")

    def _bar(self, point: Point) -> float:
        if max(self._seeds()) == 1:
            return point.error
        return statistics.stdev(point.values) if len(point.values) > 1 else 0.0

    def _seeds(self) -> set[int]:
        return {len(point.values) for _, own in self.points.items() for point in own}


def axis_of_numbers(rows: Sequence[Row], axes: Sequence[str]) -> str | None:
    """Return the axis to draw along: the first of several numbers that is a sparsity, or else the first of several
    numbers; None where there is none."""
    numeric = [axis for axis in axes if axis != SEED and len({_number(row[axis]) for row in rows} - {None}) > 1]
    return next((axis for axis in numeric if axis.endswith("sparsity")), next(iter(numeric), None))


def lines_of(rows: Sequence[Row], axes: Sequence[str], x: str, measure: str) -> Lines:
    """Return the points of a measure along the axis `x`, a line for each combination of the axes besides it and seeds.

    A line is of one configuration, which its label names: the one that was measured in most cells of the line; of
    several, the one that is made last; of these, the last in the table.
    """
    by_line: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_line[", ".join(str(row[axis]) for axis in axes if axis not in (x, SEED))].append(row)
    points: dict[str, list[Point]] = {}
    left_out: dict[str, None] = {}
    for combination, own in by_line.items():
        measured = [row for row in own if row.get(measure) is not None and _number(row[x]) is not None]
        drawn = _configuration(measured)
        cells: dict[str, list[Row]] = defaultdict(list)
        for row in measured:
            if row["configuration"] == drawn:
                cells[str(row[x])].append(row)
        if cells:
            label = f"{combination}: {drawn}" if combination else str(drawn)
            points[label] = sorted((_point(x, same, measure) for same in cells.values()), key=lambda point: point.x)
        prefix = f"{combination}, " if combination else ""
        left_out |= dict.fromkeys(f"{prefix}{x} {row[x]}" for row in own if str(row[x]) not in cells)
    return Lines(points, tuple(left_out))


def _configuration(rows: Sequence[Row]) -> str | None:
    """Return the configuration that a line is drawn of; None where nothing was measured."""
    cells: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        cells[row["configuration"]].add(row["run"])
    last = {configuration: place for place, configuration in enumerate(row["configuration"] for row in rows)}
    return max(cells, key=lambda one: (len(cells[one]), _made(one), last[one]), default=None)


def _point(x: str, rows: Sequence[Row], measure: str) -> Point:
    values = tuple(float(row[measure]) for row in rows)
    known = rows[0].get("stderr" if measure == "accuracy" else f"{measure}_stderr") if len(values) == 1 else None
    return Point(float(rows[0][x]), values, float(known or 0.0))


def _made(configuration: str) -> int:
    """Return how late a configuration's model is made."""
    order = [stage.partition(":")[0] for stage in EVALUABLE]
    return order.index(configuration.partition(" ")[0].partition(":")[0])


def _number(label: object) -> float | None:
    try:
        number = float(str(label))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
