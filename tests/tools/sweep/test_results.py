"""Rows, the table of means over seeds, and the files of a sweep."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from sqft.tools.sweep import Cell, CellResult, SweepResults

AXES = ("adapter", "seed")


def row(configuration: str, seed: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    return {
        "recipe": "r", "seed": seed, "configuration": configuration, "accuracy": accuracy, "stderr": 0.02,
        "perplexity": 12.0, "sparsity": 0.5, "trainable": None, "storage": 5, "seconds": 1.0, "peak_memory": 7,
        "evaluation_seconds": 2.0, "perplexity a.txt": 10.0 + seed, **more,
    }  # fmt: skip


def result(adapter: str, seed: int, *rows: dict[str, Any], error: str | None = None) -> CellResult:
    cell = Cell(f"s-{adapter}-{seed}", {"adapter": adapter, "seed": str(seed)}, Path("a.json"), ())
    return CellResult(cell, Path("runs") / f"s-{adapter}-{seed}-0", rows if not error else None, error)


@pytest.fixture
def results(tmp_path: Path) -> SweepResults:
    """Of lora, three seeds; of nls, one that measured a task too, and one that failed."""
    cells = [result("lora", seed, row("model", seed, None), row("merge", seed, 0.2 + 0.1 * seed)) for seed in range(3)]
    cells += [result("nls", 0, row("merge", 0, 0.5, **{"arc acc": 0.25, "arc acc_stderr": 0.1}))]
    cells += [result("nls", 1, error="no *room*")]
    return SweepResults("s", AXES, tuple(cells), tmp_path / "new" / "s")


def test_means_over_seeds(results: SweepResults) -> None:
    heads, cells = results.table()
    assert heads == ["adapter", "configuration", "seeds", "accuracy", "perplexity", "sparsity", "arc acc"]
    spread = statistics.stdev([0.2, 0.3, 0.4])
    assert cells == [
        ["lora", "model", "3", "–", "12.00 ± 0.00", "50.00%", "–"],
        ["lora", "merge", "3", f"30.0% ± {spread:.1%}", "12.00 ± 0.00", "50.00%", "–"],
        ["nls", "merge", "1", "50.0% ± 2.0%", "12.00", "50.00%", "0.250"],
    ]


def test_a_figure_that_some_seeds_lack() -> None:
    """Its mean says of how many it is, and has no error of one of them."""
    cells = [result("lora", seed, row("merge", seed, accuracy)) for seed, accuracy in enumerate((0.5, None, None))]
    _, ((*_, accuracy, _, _),) = SweepResults("s", AXES, tuple(cells), Path()).table()
    assert accuracy == "50.0% (1 of 3)"


def test_several_texts_are_shown_by_name() -> None:
    more = {"perplexity b.txt": 20.0}
    found = SweepResults(
        "s", AXES, tuple(result("lora", seed, row("merge", seed, 0.5, **more)) for seed in (0, 1)), Path()
    )
    heads, ((*_, one, other),) = found.table()
    assert heads[-3:] == ["sparsity", "perplexity a.txt", "perplexity b.txt"]
    assert one == f"10.50 ± {statistics.stdev([10, 11]):.2f}" and other == "20.00 ± 0.00"


def test_the_files(results: SweepResults, tmp_path: Path) -> None:
    results.write()
    read = json.loads((tmp_path / "new" / "s" / "results.json").read_text())
    assert [cell["state"] for cell in read["cells"]] == ["done"] * 4 + ["failed"] and read["axes"] == [*AXES]
    assert read["rows"] == results.rows() and len(results.rows()) == 7
    assert results.rows()[0]["run"] == "s-lora-0-0" and results.rows()[0]["arc acc"] is None
    assert len({tuple(one) for one in results.rows()}) == 1  # equal keys
    with (tmp_path / "new" / "s" / "results.csv").open() as lines:
        found = list(csv.DictReader(lines))
    assert [line["accuracy"] for line in found] == ["", "0.2", "", "0.30000000000000004", "", "0.4", "0.5"]
    assert {line["seed"] for line in found} == {"0", "1", "2"}
    text = (tmp_path / "new" / "s" / "report.md").read_text()
    assert text.startswith("# s\n\n| adapter |") and text.endswith("\n- failed: adapter nls, seed 1 (no \\*room\\*)")


def test_no_cell_is_done(tmp_path: Path) -> None:
    empty = SweepResults("s", AXES, (result("lora", 0, error="x"),), tmp_path)
    empty.write()
    assert empty.table() == (["adapter", "configuration", "seeds"], []) and [one.error for one in empty.failed] == ["x"]
