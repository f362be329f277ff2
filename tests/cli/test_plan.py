"""`sqft plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from sqft import Orchestrator
from sqft.cli import main


def test_plan_touches_nothing(recipe: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["plan", str(recipe), "--store", str(tmp_path / "s")])
    assert done.exit_code == 0 and "finetune" in done.output and "run" in done.output
    assert not (tmp_path / "s").exists()


def test_plan_says_that_the_disk_is_too_small(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["plan", str(recipe), "--store", str(tmp_path / "s")]
    assert "make room" not in CliRunner().invoke(main, command).output
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10 << 10))
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and f"note: on this machine, the store {tmp_path / 's'} needs about" in done.output
    assert f"and {tmp_path} has 10 KiB free; make room" in done.output


def test_plan_says_that_the_store_cannot_be_made(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["plan", str(recipe), "--store", str(tmp_path / "file" / "s")])
    assert done.exit_code == 0 and f"{tmp_path / 'file'} is a file; name another with --store" in done.output


def test_plan_prints_its_notes(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Orchestrator.plan
    noted = lambda self, recipe: dataclasses.replace(made(self, recipe), notes=("data: is short",))  # noqa: E731
    monkeypatch.setattr(Orchestrator, "plan", noted)
    done = CliRunner().invoke(main, ["plan", str(recipe), "--store", str(tmp_path / "s")])
    assert done.exit_code == 0 and "\nnote: data: is short\n" in done.output
