"""A store that another version of sqft made: its artifacts are kept, the steps are made again, and one line says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sqft import Orchestrator, Recipe, Registry
from sqft.cli import main


@pytest.fixture
def sparse(raw: dict[str, Any]) -> dict[str, Any]:
    for section in ("finetune", "search", "merge", "evaluate"):
        raw.pop(section)
    return raw


def run(registry: Registry, store: Path, raw: dict[str, Any]) -> tuple[Path, Path]:
    """Run a recipe; return the folders of its run and of its artifact."""
    orchestrator = Orchestrator(registry, store)
    finished = orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
    return finished.folder, finished["sparsify"].folder


def edit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that sqft's own code is another."""
    for module in ("sqft.planning.fingerprint", "sqft.execution.earlier_runs", "sqft.execution.run_folder"):
        monkeypatch.setattr(f"{module}.core_digest", lambda stage: "other code")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_store_of_another_version(
    registry: Registry, sparse: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, recorded: bool,
) -> None:  # fmt: skip
    store, file = tmp_path / "store", tmp_path / "recipe.json"
    file.write_text(json.dumps(sparse))
    caplog.set_level("INFO", "sqft")
    old_run, old_artifact = run(registry, store, sparse)
    assert "made again" not in caplog.text
    if not recorded:  # the first version did not note its code
        plan = json.loads((old_run / "plan.json").read_text())
        (old_run / "plan.json").write_text(json.dumps([{k: v for k, v in s.items() if k != "code"} for s in plan]))
    edit_code(monkeypatch)
    shown = CliRunner().invoke(main, ["plan", str(file), "--store", str(store)])
    assert shown.exit_code == 0 and f"since run {old_run.name}: sparsify." in shown.output
    new_run, new_artifact = run(registry, store, sparse)
    assert caplog.text.count("made again") == 1 and f"until you delete {old_run} and" in caplog.text
    assert (new_run / "run.log").read_text().count("made again") == 1
    assert new_artifact != old_artifact and old_artifact.is_dir()
    status = CliRunner().invoke(main, ["status", "--store", str(store)])
    assert status.exit_code == 0 and status.output.count("| 1 of 1 |") == 2
    caplog.clear()
    run(registry, store, sparse)
    assert "made again" not in caplog.text


def test_other_changes_are_not_blamed_on_the_code(
    registry: Registry, sparse: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "sqft")
    text = tmp_path / "calibration.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} is a number of some length"}) + "\n" for n in range(200)))
    sparse["calibration"]["data"] = str(text)
    run(registry, tmp_path / "store", sparse)
    text.write_text(text.read_text() + text.read_text())
    run(registry, tmp_path / "store", sparse)  # the data
    sparse["sparsify"]["sparsity"] = 0.25
    edit_code(monkeypatch)
    (folder, _) = run(registry, tmp_path / "store", sparse)  # the recipe
    assert len(list(folder.parent.iterdir())) == 3 and "made again" not in caplog.text


def test_later_sections_and_other_runs_do_not_hide_it(
    registry: Registry, sparse: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse["sparsify"] = {"scorer": "magnitude", "pattern": "2:4"}
    old_run, _ = run(registry, tmp_path / "store", sparse)
    edit_code(monkeypatch)
    damaged = tmp_path / "store" / "runs" / "tiny-ffffffff"
    damaged.mkdir()
    (damaged / "recipe.json").write_text((old_run / "recipe.json").read_text())
    (damaged / "plan.json").write_text('["a", {"name": "sparsify", "fingerprint": 1}]')
    note = f"made again, since sqft's code has changed since run {old_run.name}: sparsify."
    shown = CliRunner().invoke(main, ["eval", str(old_run)])
    assert shown.exit_code == 2 and note in shown.output
    sparse["evaluate"] = {"of": ["sparsify"], "perplexity": {"text": str(tmp_path / "text.txt"), "length": 32}}
    (tmp_path / "text.txt").write_text("a line of some text " * 20)
    new_run, _ = run(registry, tmp_path / "store", sparse)
    assert (new_run / "run.log").read_text().count(note) == 1
