"""Differences of cells on the same questions, clustered by question."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sqft import Artifact, Orchestrator, Registry
from sqft.tools.sweep import Sweep, SweepResults, plan_cells, run_sweep
from sqft.tools.sweep.comparison import _differences, differences
from sqft.tools.sweep.definition import Cell
from sqft.tools.sweep.results import CellResult


@pytest.fixture(scope="module")
def done(tiny_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepResults, Path]:
    """Two sparsities and two seeds, untrained, on ten questions."""
    folder = tmp_path_factory.mktemp("sweep")
    raw = {key: tiny_recipe[key] for key in ("name", "model", "calibration", "sparsify", "evaluate")}
    raw["evaluate"] = raw["evaluate"] | {"of": ["model", "sparsify"]}
    (folder / "recipe.json").write_text(json.dumps(raw))
    axes = {"sparsify.sparsity": [0.5, 0.9], "seed": [0, 1]}
    sweep = Sweep.parse({"name": "s", "recipe": "recipe.json", "axes": axes}, folder)
    orchestrator = Orchestrator(Registry.discover(), folder / "store")
    return run_sweep(sweep, orchestrator, plan_cells(sweep, orchestrator)), folder / "store"


def test_only_what_differs_is_compared(done: tuple[SweepResults, Path]) -> None:
    """The dense model is the same in all cells; the texts' perplexity is no question."""
    results, store = done
    (found,) = results.differences
    assert found.configuration == "sparsify" and [*found.by_seed] == ["0", "1"]
    assert (found.cell, found.first) == ("sparsify.sparsity 0.9", "sparsify.sparsity 0.5")
    accuracy = {
        (row["sparsify.sparsity"], row["seed"]): row["accuracy"] for row in results.rows() if row["sparsity"] > 0.1
    }
    for seed, value in found.by_seed.items():
        assert value == pytest.approx(accuracy["0.9", int(seed)] - accuracy["0.5", int(seed)])
    read = json.loads((store / "sweeps" / "s" / "results.json").read_text())
    assert read["differences"][0]["by_seed"] == found.by_seed
    assert (
        "| sparsify.sparsity 0.9 | sparsify.sparsity 0.5 | sparsify |"
        in (store / "sweeps" / "s" / "report.md").read_text()
    )


def test_a_damaged_file_costs_one_cell_and_not_the_table(
    done: tuple[SweepResults, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The change keeps the file's size, which is all that opening an artifact looks at."""
    results, store = done
    shutil.copytree(store, tmp_path / "store")
    moved = [replace(one, folder=tmp_path / "store" / one.folder.relative_to(store)) for one in results.cells]
    row = json.loads((moved[-1].folder / "run.json").read_text())["artifacts"]["evaluate:sparsify"]
    answers = (moved[-1].folder / row).resolve() / "predictions.jsonl"
    answers.write_text(answers.read_text().replace('"right": false', '"right":  0.50'))
    (found,) = differences(replace(results, cells=tuple(moved)), tmp_path / "store")
    assert [*found.by_seed] == ["0"] and found.by_seed["0"] == results.differences[0].by_seed["0"]
    assert "cell (sparsify.sparsity 0.9, seed 1) is not compared: " in caplog.text
    assert f"predictions.jsonl is damaged (it has changed since it was stored); delete {answers.parent}" in caplog.text


class Facts:
    """What of a run's facts is asked for: the answers, under their rules."""

    def __init__(self, folder: str, inputs: dict[str, str] | None = None, **answers: float) -> None:
        self.artifacts = {"evaluate:merge": Artifact(Path(folder), {"inputs": inputs or {}})}
        measure = type("Measure", (), {"rules": "r", "name": "accuracy", "answers": answers})()
        self.measures = {"merge": [measure]}

    def configurations(self) -> dict[str, str]:
        return {"merge": "evaluate:merge"}


def test_a_question_is_drawn_with_its_answers_of_all_seeds() -> None:
    """Against all draws of the questions, listed; a question that one seed lacks does not count."""
    before: Any = {"0": Facts("a", q=0, r=1, s=0, t=1), "1": Facts("b", q=0, r=0, s=1), "2": Facts("c", q=1)}
    after: Any = {"0": Facts("d", q=1, r=1, s=1, t=1), "1": Facts("e", q=1, r=0, s=0), "3": Facts("f", q=1)}
    (found,) = _differences("first", before, "second", after, set())
    means = [(1 + 1) / 2, 0.0, (1 - 1) / 2]  # of q, r, s over the seeds
    assert found.by_seed == {"0": pytest.approx(2 / 3), "1": 0.0} and found.difference == pytest.approx(1 / 3)
    draws = sorted(statistics.mean(draw) for draw in itertools.product(means, repeat=3))
    low, high = (draws[math.ceil(share * len(draws)) - 1] for share in (0.025, 0.975))
    assert found.interval == (pytest.approx(low), pytest.approx(high))
    assert found.cells()[-3:] == ["+33.3 points", "+0.0 to +100.0", "0: +66.7, 1: +0.0"]


def test_cells_that_differ_on_one_axis_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with the first on that axis that has the same measure: "none" has another configuration, "y" is not run."""
    given = {
        **{("1", "none"): "s", ("1", "x"): "m", ("1", "y"): None, ("1", "z"): "m"},
        **{("2", "none"): "s", ("2", "x"): "m", ("2", "y"): "m", ("2", "z"): "m"},
    }

    def facts(folder: Path, _: Path) -> Any:
        a, b = folder.name
        configuration = "sparsify" if given["12"["ab".index(a)], {"n": "none"}.get(b, b)] == "s" else "merge"
        one: Any = Facts(folder.name, q=float("ab".index(a)), r=float("nxyz".index(b)))
        one.artifacts = {f"evaluate:{configuration}": one.artifacts["evaluate:merge"]}
        one.configurations = lambda: {configuration: f"evaluate:{configuration}"}
        one.measures = {configuration: one.measures["merge"]}
        return one

    monkeypatch.setattr("sqft.tools.sweep.comparison.read_facts", facts)
    cells = tuple(
        CellResult(Cell("", {"n": n, "a": a, "seed": "0"}, Path(), ()), Path("ab"["12".index(n)] + a[0]), done and ())
        for (n, a), done in given.items()
    )
    found = differences(SweepResults("s", ("n", "a", "seed"), cells, Path()), Path())
    assert [(one.cell, one.first, one.difference) for one in found] == [
        ("n 1, a z", "n 1, a x", 1.0),
        ("n 2, a none", "n 1, a none", 0.5),
        ("n 2, a x", "n 1, a x", 0.5),
        ("n 2, a y", "n 2, a x", 0.5),
        ("n 2, a z", "n 1, a z", 0.5),
        ("n 2, a z", "n 2, a x", 1.0),
    ]


def test_the_same_model_is_not_compared() -> None:
    one: Any = {"0": Facts("a", q=0)}
    known: set[tuple[str, str]] = set()
    other_seed: Any = {"1": Facts("b", q=0)}
    assert _differences("x", one, "y", other_seed, known) == [] and not known
    same: Any = {"0": Facts("a", q=0)}
    assert _differences("x", one, "y", same, known) == [] and known == {("merge", "accuracy")}
    asked_otherwise: list[Any] = [{"0": Facts(folder, {"merge": "m"}, q=0)} for folder in "cd"]
    assert _differences("x", asked_otherwise[0], "y", asked_otherwise[1], set()) == []
    other: Any = {"0": Facts("b", q=1)}
    assert _differences("x", one, "y", other, known) == []
    assert len(_differences("x", one, "y", other, set())) == 1
    assert differences(SweepResults("s", (), (), Path()), Path()) == []
