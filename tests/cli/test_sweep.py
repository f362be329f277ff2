"""`sqft sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sqft import Orchestrator
from sqft.cli import main
from sqft.errors import SqftError


@pytest.fixture
def file(raw: dict[str, Any], tmp_path: Path) -> Path:
    """Two sparsities, measured."""
    measured = {key: raw[key] for key in ("schema", "name", "model", "calibration", "sparsify", "evaluate")}
    measured["evaluate"]["of"] = ["sparsify"]
    (tmp_path / "recipe.json").write_text(json.dumps(measured))
    sweep = {"name": "by-sparsity", "recipe": "recipe.json", "axes": {"sparsify.sparsity": [0.25, 0.5]}}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    return tmp_path / "sweep.json"


def asked(file: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["sweep", str(file), "--store", str(file.parent / "store"), *words])


def test_a_sweep(file: Path) -> None:
    planned = asked(file, "--plan")
    assert planned.exit_code == 0, planned.output
    assert "2 cells, 4 steps: 4 different ones, of which 0 are done" in planned.output
    assert "sparsify.sparsity 0.25: sparsify, evaluate:sparsify" in planned.output
    assert not (file.parent / "store").exists()
    done = asked(file)
    assert done.exit_code == 0, done.output
    assert "| 0.5 | sparsify | 1 |" in done.output and "50.00%" in done.output
    assert (file.parent / "store" / "sweeps" / "by-sparsity" / "results.csv").is_file()
    assert "sparsify.sparsity 0.25: done" in asked(file, "--plan").output
    assert "0 are done" in asked(file, "--plan", "--set", "seed=3").output
    store = file.parent / "store"
    shown = CliRunner().invoke(main, ["report", "by-sparsity", "--store", str(store)])
    page = store / "sweeps" / "by-sparsity" / "report.html"
    assert shown.output == f"page: {page}\n" and "perplexity by sparsify.sparsity" in page.read_text()
    mixed = CliRunner().invoke(main, ["report", "by-sparsity-0.25", "by-sparsity", "--store", str(store)])
    assert mixed.exit_code == 2 and "is a sweep, with a page of its own; name it alone" in mixed.output


def test_failed_cells_are_named_with_status_2(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise SqftError("no room")

    monkeypatch.setattr(Orchestrator, "run", failing)
    done = asked(file)
    assert done.exit_code == 2
    assert "2 of 2 cells failed: (sparsify.sparsity 0.25); (sparsify.sparsity 0.5)" in done.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": {"sparsify.sparsity": [1.5]}}, "(sparsify.sparsity 1.5): "),
        ({"recipe": "none.json"}, "cannot be read"),
        ({"axes": {}}, "axes: "),
    ],
)
def test_mistakes_are_one_message(change: dict[str, Any], message: str, file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    wrong = asked(file)
    assert wrong.exit_code == 2 and wrong.output.startswith("error: ") and message in wrong.output
    assert "Traceback" not in wrong.output
