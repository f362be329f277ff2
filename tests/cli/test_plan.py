"""`sqft plan`."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from sqft.cli import main


def test_plan_touches_nothing(recipe: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["plan", str(recipe), "--store", str(tmp_path / "s")])
    assert done.exit_code == 0 and "finetune" in done.output and "run" in done.output
    assert not (tmp_path / "s").exists()
