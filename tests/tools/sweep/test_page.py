"""The page of a sweep: as in the paper's Figure 5, a line for each adapter over the sparsity, with a spread."""

from __future__ import annotations

import copy
import functools
import json
import re
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Registry
from sqft.errors import SqftError, StoreError
from sqft.tools.run_report import charts
from sqft.tools.sweep import Sweep, plan_cells, run_sweep
from sqft.tools.sweep.lines import axis_of_numbers, lines_of
from sqft.tools.sweep.page import find_sweep, render_sweep

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
    assert [*lines.points] == ["none: sparsify", "LoRA: merge", "NLS: merge"] and not lines.left_out
    for label, points in lines.bars().items():
        adapter, _, last = label.partition(": ")
        assert [x for x, *_ in points] == [0.25, 0.75]
        for x, mean, spread in points:
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
        assert {"none: sparsify", "LoRA: merge", "NLS: merge", "sparsify.sparsity"} <= set(texts)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and "On the same" not in page and "same questions with the same seeds" in page


def test_cells_that_are_not_done_are_named(folder: Path, tmp_path: Path) -> None:
    read = json.loads((folder / "results.json").read_text())
    read["cells"][0] |= {"state": "failed", "error": "no <room>"}
    read["rows"] = []
    (tmp_path / "results.json").write_text(json.dumps(read))
    page = render_sweep(tmp_path)
    assert "Nothing was measured: the recipe has no section evaluate." in page
    assert "failed: sparsify.sparsity 0.75, adapter none, seed 0. no &lt;room&gt;" in page and "<svg" not in page


def test_no_cell_is_done(folder: Path, tmp_path: Path) -> None:
    read = json.loads((folder / "results.json").read_text()) | {"rows": [], "differences": []}
    read["cells"] = [cell | {"state": "not run"} for cell in read["cells"]]
    (tmp_path / "results.json").write_text(json.dumps(read))
    page = render_sweep(tmp_path)
    assert "No cell is done yet." in page and "no section evaluate" not in page


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rows", 0, "run"), None),
        (("rows", 0, "configuration"), "none such"),
        (("differences", 0, "interval"), None),
        (("differences", 0, "by_seed"), {}),
        (("rows", 0, "accuracy"), "much"),
        (("axes",), {"bits": 1}),
        (("cells",), {}),
        (("rows",), {}),
    ],
    ids=str,
)
def test_damaged_results_are_one_message(
    folder: Path, tmp_path: Path, place: tuple[str | int, ...], value: object
) -> None:
    read = json.loads((folder / "results.json").read_text())
    holder = functools.reduce(lambda held, key: held[key], place[:-1], read)
    if place[-1] == "run":
        del holder["run"]
    else:
        holder[place[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(read))
    with pytest.raises(StoreError, match=r"results.json cannot be read .*run `sqft sweep` again"):
        render_sweep(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"sweep": "a"}', "[" * 100_000], ids=["cut", "list", "part", "deep"])
def test_results_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(StoreError, match=r"results.json cannot be read .*run `sqft sweep` again"):
        render_sweep(tmp_path)


def test_where_a_sweep_is(folder: Path, tmp_path: Path) -> None:
    store = folder.parents[1]
    assert find_sweep("figure", store) == folder and find_sweep(str(folder), tmp_path) == folder
    assert find_sweep("none", store) is None and find_sweep("figure", tmp_path) is None


def test_a_sweep_and_a_run_of_one_name(tmp_path: Path) -> None:
    """Their folders tell them apart; a run's folder is never a sweep."""
    sweep, run = tmp_path / "sweeps" / "mine", tmp_path / "runs" / "mine-00000000"
    for made in (sweep, run):
        made.mkdir(parents=True)
    (sweep / "results.json").write_text("{}")
    assert find_sweep("mine", tmp_path) == sweep
    (run / "recipe.json").write_text("{}")
    with pytest.raises(SqftError, match="'mine' is a sweep and a run: name the folder") as caught:
        find_sweep("mine", tmp_path)
    assert str(sweep) in str(caught.value) and str(run) in str(caught.value)
    assert find_sweep(str(sweep), tmp_path) == sweep and find_sweep(str(run), tmp_path) is None


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Exception, match=charts.MISSING.partition(":")[0]):
        render_sweep(folder)
