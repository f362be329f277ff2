"""What the cells of a sweep measured: tidy rows, a table of means over seeds, and the files of both."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqft.tools.sweep.definition import RESERVED, SEED, Cell
from sqft.utils.files import write_json, write_text
from sqft.utils.text import escaped, markdown_rows, markdown_table, signed_percent

FIGURES = ("accuracy", "perplexity", "sparsity")
"""Those of RESERVED that the table has."""


@dataclass(frozen=True)
class CellResult:
    """What became of a cell.

    Args:
        cell: the cell.
        folder: of its run.
        rows: what was measured, a flat dict for each configuration; None unless it is done.
        error: why it failed; None when it did not.
    """

    cell: Cell
    folder: Path
    rows: tuple[dict[str, Any], ...] | None = None
    error: str | None = None

    @property
    def state(self) -> str:
        """One of "done", "failed" and "not run"."""
        return "failed" if self.error else "not run" if self.rows is None else "done"


DIFFERENCE_HEADS = ["cell", "less", "configuration", "measure", "seeds", "difference", "95 % interval", "by seed"]


@dataclass(frozen=True)
class CellDifference:
    """What a cell gives on a measure, less what another gives on the same questions with the same seeds."""

    cell: str
    first: str
    configuration: str
    measure: str
    by_seed: Mapping[str, float]
    """The mean difference of each seed."""
    interval: tuple[float, float]
    """Where the mean lies in 95 of 100 draws of the questions, each drawn with its answers of all seeds: seeds share
    the questions, so their answers to one are a cluster (Field and Welsh 2007, the cluster bootstrap)."""

    @property
    def difference(self) -> float:
        """The mean over questions and seeds."""
        return math.fsum(self.by_seed.values()) / len(self.by_seed)

    def cells(self) -> list[str]:
        """Return the difference as text: cells under `DIFFERENCE_HEADS`."""
        low, high = map(signed_percent, self.interval)
        seeds = ", ".join(f"{seed}: {signed_percent(value)}".removeprefix(": ") for seed, value in self.by_seed.items())
        shown = f"{signed_percent(self.difference)} points"
        named = [self.cell, self.first, self.configuration, self.measure, str(len(self.by_seed))]
        return [*named, shown, f"{low} to {high}", seeds]


@dataclass(frozen=True)
class SweepResults:
    """What all cells of a sweep measured."""

    name: str
    axes: tuple[str, ...]
    cells: tuple[CellResult, ...]
    folder: Path
    """Where the results are written."""
    differences: tuple[CellDifference, ...] = ()
    """Of cells that differ on one axis; while cells run, of those that were done before."""

    @property
    def failed(self) -> list[CellResult]:
        """The cells that failed."""
        return [one for one in self.cells if one.error]

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat dict for each configuration of each cell, with equal keys, for `pandas.DataFrame`."""
        rows = [
            {**one.cell.values, **{key: value for key, value in row.items() if key != "recipe"}, "run": one.folder.name}
            for one in self.cells
            for row in one.rows or ()
        ]
        keys = dict.fromkeys(key for row in rows for key in row)
        return [{key: row.get(key) for key in keys} for row in rows]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return `means` of the rows."""
        return means(self.rows(), self.axes)

    def write(self) -> None:
        """Write results.json, results.csv and report.md."""
        rows, text = self.rows(), io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["run"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        cells = [
            {
                "values": dict(one.cell.values),
                "recipe": one.cell.recipe.name,
                "changes": one.cell.changes,
                "run": one.folder.name,
                "state": one.state,
                "error": one.error,
            }
            for one in self.cells
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [{**asdict(one), "difference": one.difference} for one in self.differences]
        content = {"sweep": self.name, "axes": self.axes, "cells": cells, "rows": rows, "differences": found}
        write_json(self.folder / "results.json", content)
        write_text(self.folder / "results.csv", text.getvalue())
        write_text(self.folder / "report.md", self._markdown())

    def _markdown(self) -> str:
        lines = [f"- {one.state}: {one.cell}" + (f" ({one.error})" if one.error else "") for one in self.cells]
        others = [line for line in lines if not line.startswith("- done")]
        differing = [one.cells() for one in self.differences]
        tables = [markdown_table(self.name, *self.table())]
        tables += [f"\n{markdown_rows(DIFFERENCE_HEADS, differing)}\n"] if differing else []
        return "".join([*tables, *(f"\n{escaped(line)}" for line in others)])


def means(rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells: a line for each configuration, its figures as means over seeds, with the standard
    deviation of several; of one seed, accuracy has its standard error."""
    axes = [axis for axis in axes if axis != SEED]
    figures = figures_of(rows, axes)
    lines: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((*(row[axis] for axis in axes), row["configuration"]), []).append(row)
    cells = [[*labels, str(len(same)), *(_mean(key, same) for key in figures)] for labels, same in lines.items()]
    return [*axes, "configuration", "seeds", *figures], cells


def figures_of(rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[str]:
    """Return the keys of what the table shows, where a row has it; of texts, "perplexity" stands for a single one."""
    keys = [key for key in (rows[0] if rows else ()) if key not in axes and not key.endswith("_stderr")]
    texts = [key for key in keys if key.startswith("perplexity ")]
    hidden = texts if len(texts) < 2 else ["perplexity"]
    shown = [key for key in keys if key not in hidden and (key in FIGURES or key not in (*RESERVED, SEED))]
    return [key for key in shown if any(row[key] is not None for row in rows)]


def _mean(key: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a figure's mean over rows, one for each seed, and how many have it where not all do."""
    values = [float(row[key]) for row in rows if row[key] is not None]
    if not values:
        return "–"
    form = {"accuracy": "{:.1%}", "sparsity": "{:.2%}"}.get(key, "{:.2f}" if key.startswith("perplexity") else "{:.3f}")
    shown = form.format(statistics.mean(values))
    if key != "sparsity" and len(values) > 1:
        shown += f" ± {form.format(statistics.stdev(values))}"
    elif key == "accuracy" and len(rows) == 1:
        shown += f" ± {form.format(rows[0]['stderr'])}"
    return shown if len(values) == len(rows) else f"{shown} ({len(values)} of {len(rows)})"
