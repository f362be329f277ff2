"""The page of a sweep: its table, each measure by an axis of numbers, and the differences of cells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sqft.errors import SqftError, StoreError
from sqft.store.runs import find_run
from sqft.tools.run_report import charts
from sqft.tools.run_report.page import NOT_MEASURED, Chart, fill, with_own_ids
from sqft.tools.sweep.lines import Lines, Row, axis_of_numbers, lines_of
from sqft.tools.sweep.results import DIFFERENCE_HEADS, CellDifference, figures_of, means
from sqft.utils.files import reason

NOTE = (
    "What a cell gives, less what the other gives on the same questions with the same seeds. The interval is where "
    "the mean lies in 95 of 100 draws of the questions. It says nothing of other seeds: look how far these lie apart."
)


def find_sweep(name: str, store: Path) -> Path | None:
    """Return a sweep's folder of results; `name` is the folder or the sweep's name. None when there is none.

    Raises:
        SqftError: when a run has this name, too.
    """
    path, named = Path(name), store / "sweeps" / name
    if (path / "recipe.json").is_file():  # a run's folder
        return None
    if _has_results(path):
        return path
    if not _has_results(named):
        return None
    with suppress(StoreError):
        run, _ = find_run(name, store)
        raise SqftError(f"'{name}' is a sweep and a run: name the folder that you mean, {named} or {run}")
    return named


def _has_results(folder: Path) -> bool:
    return folder.resolve().parent.name == "sweeps" and (folder / "results.json").is_file()


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
        if not all(isinstance(one, list) for one in (axes, cells, rows)):
            raise TypeError("axes, cells and rows must be lists")
        differences = [CellDifference(**{k: v for k, v in d.items() if k != "difference"}) for d in read["differences"]]
        compared = [one.cells() for one in differences]
        heads, table = means(rows, axes)
        open_cells = [one for one in cells if one["state"] != "done"]
        notes = [f"{one['state']}: {_label(one['values'])}. {one['error'] or ''}" for one in open_cells]
        drawn = [(y, x, lines.bars(), lines.caption()) for y, x, lines in _lines(rows, axes)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise StoreError(f"{file} cannot be read ({reason(error)}); run `sqft sweep` again") from None
    overall = (Chart(f"{y} by {x}", charts.error_chart(bars, x, y), caption) for y, x, bars, caption in drawn)
    return fill(
        title=name,
        subtitle=f"a sweep of {len(cells)} cells, of which {len(cells) - len(open_cells)} are done",
        results={"heads": heads, "rows": table},
        nothing=NOT_MEASURED if len(open_cells) < len(cells) else "No cell is done yet.",
        settings=notes,
        compared={"heads": DIFFERENCE_HEADS, "rows": compared, "marked": (), "note": NOTE},
        overall=with_own_ids(overall, "all-"),
        runs=[],
    )


def _lines(rows: Sequence[Row], axes: Sequence[str]) -> Iterator[tuple[str, str, Lines]]:
    """Yield each measure, the axis of numbers, and the measure along it."""
    x = axis_of_numbers(rows, axes)
    for measure in figures_of(rows, axes) if x else ():
        if measure != "sparsity" and (lines := lines_of(rows, axes, str(x), measure)).points:
            yield measure, str(x), lines


def _label(values: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in values.items())
