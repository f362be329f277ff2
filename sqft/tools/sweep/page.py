"""The page of a sweep: its table, each measure by an axis of numbers, and the differences of cells."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqft.errors import StoreError
from sqft.recipe.stages import EVALUABLE
from sqft.tools.run_report import charts
from sqft.tools.run_report.page import Chart, fill, with_own_ids
from sqft.tools.sweep.definition import SEED
from sqft.tools.sweep.results import DIFFERENCE_HEADS, CellDifference, figures_of, means
from sqft.utils.files import reason

NOTE = (
    "What a cell gives, less what the first one gives on the same questions with the same seeds. The interval is where "
    "the mean lies in 95 of 100 draws of the questions. It says nothing of other seeds: look how far these lie apart."
)
CAPTION = (
    "The last model of each cell: the mean over seeds, with their standard deviation. Of one seed, the standard error "
    "of the measure, where there is one."
)
Row = Mapping[str, Any]


def find_sweep(name: str, store: Path) -> Path | None:
    """Return a sweep's folder of results; `name` is the folder or the sweep's name. None when there is none."""
    folders = (Path(name), store / "sweeps" / name)
    found = (folder for folder in folders if folder.resolve().parent.name == "sweeps")
    return next((folder for folder in found if (folder / "results.json").is_file()), None)


def render_sweep(folder: Path) -> str:
    """Return the page of a folder of results.

    Raises:
        StoreError: when its results cannot be read.
        SqftError: when matplotlib, which draws the charts, is not installed.
    """
    file = folder / "results.json"
    try:
        read = json.loads(file.read_text("utf-8"))
        name, axes, cells, rows = read["sweep"], read["axes"], read["cells"], read["rows"]
        differences = [CellDifference(**{k: v for k, v in d.items() if k != "difference"}) for d in read["differences"]]
        heads, lines = means(rows, axes)
        open_cells = [one for one in cells if one["state"] != "done"]
        notes = [f"{one['state']}: {_label(one['values'])}. {one['error'] or ''}" for one in open_cells]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StoreError(f"{file} cannot be read ({reason(error)}); run `sqft sweep` again") from None
    return fill(
        title=name,
        subtitle=f"a sweep of {len(cells)} cells, of which {len(cells) - len(open_cells)} are done",
        results={"heads": heads, "rows": lines},
        settings=notes,
        compared={"heads": DIFFERENCE_HEADS, "rows": [one.cells() for one in differences], "marked": (), "note": NOTE},
        overall=with_own_ids(_charts(rows, axes), "all-"),
        runs=[],
    )


def _charts(rows: Sequence[Row], axes: Sequence[str]) -> Iterator[Chart]:
    """Draw each measure against the axis of numbers, a line for each combination of the other axes."""
    x = axis_of_numbers(rows, axes)
    for measure in figures_of(rows, axes) if x else ():
        if measure != "sparsity" and (lines := lines_of(rows, axes, str(x), measure)):
            yield Chart(f"{measure} by {x}", charts.error_chart(lines, str(x), measure), CAPTION)


def axis_of_numbers(rows: Sequence[Row], axes: Sequence[str]) -> str | None:
    """Return the axis to draw along: the first of several numbers that is a sparsity, or else the first of several
    numbers; None where there is none."""
    numeric = [axis for axis in axes if axis != SEED and len({_number(row[axis]) for row in rows} - {None}) > 1]
    return next((axis for axis in numeric if axis.endswith("sparsity")), next(iter(numeric), None))


def lines_of(
    rows: Sequence[Row], axes: Sequence[str], x: str, measure: str
) -> dict[str, list[tuple[float, float, float]]]:
    """Return points (x, mean over seeds, its spread) of each combination of the axes besides `x` and the seed's.

    A cell is drawn by the last of its models that was measured, in the order in which models are made.
    """
    others = [axis for axis in axes if axis not in (x, SEED)]
    last: dict[str, Row] = {row["run"]: row for row in sorted(rows, key=_made) if row.get(measure) is not None}
    points: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        place = _number(row[x])
        if place is not None and last.get(row["run"]) is row:
            points[", ".join(str(row[axis]) for axis in others) or measure][place].append(row)
    return {
        label: [(place, *_mean(same, measure)) for place, same in sorted(by_place.items())]
        for label, by_place in points.items()
    }


def _mean(rows: Sequence[Row], measure: str) -> tuple[float, float]:
    values = [float(row[measure]) for row in rows]
    if len(values) > 1:
        return statistics.fmean(values), statistics.stdev(values)
    known = rows[0].get("stderr" if measure == "accuracy" else f"{measure}_stderr")
    return values[0], float(known or 0.0)


def _made(row: Row) -> int:
    """Return how late a row's model is made."""
    order = [stage.partition(":")[0] for stage in EVALUABLE]
    return order.index(row["configuration"].partition(" ")[0].partition(":")[0])


def _number(label: object) -> float | None:
    try:
        return float(str(label))
    except ValueError:
        return None


def _label(values: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in values.items())
