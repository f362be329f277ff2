"""`sqft plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from sqft import Orchestrator
from sqft.cli import main


def test_plan_touches_nothing(recipe: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["plan", str(recipe), "--store", str(tmp_path / "s")])
    assert done.exit_code == 0 and "finetune" in done.output and "run" in done.output
    assert not (tmp_path / "s").exists()


def test_plan_prints_its_notes(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Orchestrator.plan
    noted = lambda self, recipe: dataclasses.replace(made(self, recipe), notes=("data: is short",))  # noqa: E731
    monkeypatch.setattr(Orchestrator, "plan", noted)
    done = CliRunner().invoke(main, ["plan", str(recipe), "--store", str(tmp_path / "s")])
    assert done.exit_code == 0 and "\nnote: data: is short\n" in done.output
