"""The page of a sweep: as in the paper's Figure 5, a line for each adapter over the sparsity, with a spread."""

from __future__ import annotations

import copy
import json
import re
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Registry
from sqft.errors import StoreError
from sqft.tools.run_report import charts
from sqft.tools.sweep import Sweep, plan_cells, run_sweep
from sqft.tools.sweep.page import axis_of_numbers, find_sweep, lines_of, render_sweep

AXES = ("sparsify.sparsity", "adapter", "seed")


@pytest.fixture(scope="session")
def folder(tiny_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sparsities, three adapters as in examples/paper/small/figure-5.json, two seeds: a real sweep."""
    made = tmp_path_factory.mktemp("figure-5")
    raw = copy.deepcopy(tiny_recipe)
    raw["finetune"]["steps"], raw["search"] = 2, {"searcher": "heuristic"}
    raw["evaluate"]["of"] = ["sparsify", "search", "merge"]
    for section in ("export", "quantize"):
        raw.pop(section, None)
    (made / "recipe.json").write_text(json.dumps(raw))
    figure = json.loads((Path(__file__).parents[3] / "examples/paper/small/figure-5.json").read_text())
    figure |= {"name": "figure", "recipe": "recipe.json"}
    figure["axes"] |= {"sparsify.sparsity": [0.75, 0.25], "seed": [0, 1]}
    figure["axes"]["adapter"]["LoRA"]["finetune.adapter"]["options"] = {"rank": 4}
    orchestrator = Orchestrator(Registry.discover(), made / "store")
    sweep = Sweep.parse(figure, made)
    return run_sweep(sweep, orchestrator, plan_cells(sweep, orchestrator)).folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["rows"]
    return rows


@pytest.mark.parametrize("measure", ["accuracy", "perplexity"])
def test_a_line_for_each_adapter(folder: Path, measure: str) -> None:
    """Of the merged models, and without an adapter of the sparse one; the mean and the spread over seeds."""
    rows = rows_of(folder)
    assert axis_of_numbers(rows, AXES) == "sparsify.sparsity"
    lines = lines_of(rows, AXES, "sparsify.sparsity", measure)
    assert [*lines] == ["none", "LoRA", "NLS"]
    for adapter, points in lines.items():
        assert [x for x, *_ in points] == [0.25, 0.75]
        for x, mean, spread in points:
            last = "sparsify" if adapter == "none" else "merge"
            of = (str(x), adapter, last)
            values = [
                row[measure] for row in rows if (row["sparsify.sparsity"], row["adapter"], row["configuration"]) == of
            ]
            assert len(values) == 2
            assert (mean, spread) == pytest.approx((statistics.mean(values), statistics.stdev(values)))


def test_the_page_has_a_chart_of_each_measure(folder: Path) -> None:
    page = render_sweep(folder)
    assert page.count("<svg") == 2 and "accuracy by sparsify.sparsity" in page and "12 cells, of which 12" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        texts = [one.text for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert {"none", "LoRA", "NLS", "sparsify.sparsity"} <= set(texts)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and "On the same" not in page and "same questions with the same seeds" in page


def row(run: str, configuration: str, **more: Any) -> dict[str, Any]:
    return {"run": run, "seed": 0, "configuration": configuration, "accuracy": 0.5, "stderr": 0.1, **more}


def test_of_one_seed_the_error_is_the_measures_own() -> None:
    rows = [
        row("a", "merge", steps="1", **{"arc acc": 0.3, "arc acc_stderr": 0.02}),
        row("b", "merge", steps="2", **{"arc acc": 0.4, "arc acc_stderr": None}),
    ]
    assert lines_of(rows, ["steps"], "steps", "arc acc") == {"arc acc": [(1, 0.3, 0.02), (2, 0.4, 0.0)]}
    assert lines_of(rows, ["steps"], "steps", "accuracy") == {"accuracy": [(1, 0.5, 0.1), (2, 0.5, 0.1)]}


def test_a_cell_is_drawn_by_its_last_model_that_was_measured() -> None:
    rows = [
        row("a", "merge", steps="1", accuracy=None),
        row("a", "finetune:maximal", steps="1", accuracy=0.25),
        row("a", "sparsify", steps="1", accuracy=0.75),
    ]
    assert lines_of(rows, ["steps"], "steps", "accuracy") == {"accuracy": [(1, 0.25, 0.1)]}


@pytest.mark.parametrize(
    ("axes", "found"),
    [
        ({"steps": "12", "sparsify.sparsity": "57"}, "sparsify.sparsity"),
        ({"steps": "12", "sparsify.sparsity": "55"}, "steps"),
        ({"adapter": "ab", "seed": "01"}, None),
    ],
)
def test_the_axis_to_draw_along(axes: dict[str, str], found: str | None) -> None:
    rows = [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]
    assert axis_of_numbers(rows, [*axes]) == found


def test_cells_that_are_not_done_are_named(folder: Path, tmp_path: Path) -> None:
    read = json.loads((folder / "results.json").read_text())
    read["cells"][0] |= {"state": "failed", "error": "no <room>"}
    read["rows"] = []
    (tmp_path / "results.json").write_text(json.dumps(read))
    page = render_sweep(tmp_path)
    assert "failed: sparsify.sparsity 0.75, adapter none, seed 0. no &lt;room&gt;" in page and "<svg" not in page


@pytest.mark.parametrize("content", ["{", "[]", '{"sweep": "a"}'])
def test_results_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(StoreError, match=r"results.json cannot be read .*run `sqft sweep` again"):
        render_sweep(tmp_path)


def test_where_a_sweep_is(folder: Path, tmp_path: Path) -> None:
    store = folder.parents[1]
    assert find_sweep("figure", store) == folder and find_sweep(str(folder), tmp_path) == folder
    assert find_sweep("none", store) is None and find_sweep("figure", tmp_path) is None


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Exception, match=charts.MISSING.partition(":")[0]):
        render_sweep(folder)
