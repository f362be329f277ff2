"""The group of commands: all are registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sqft.cli import main


def test_every_command_of_the_folder_is_registered() -> None:
    folder = Path(__file__).parents[2] / "sqft" / "cli"
    shared = {"__init__", "completion", "group", "options", "output", "running"}
    files = {file.stem for file in folder.glob("*.py")} - shared
    assert {"evaluate" if name == "eval" else name for name in main.commands} == files
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    listed = " ".join(shown.output.partition("Commands:")[2].split())  # lines are wrapped, and nothing is cut
    assert "..." not in listed and "Run the recipe of RUN up to the merge." in listed


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_runs_no_recipe_prints_in_every_process(tmp_path: Path, rank: str) -> None:
    """Some launchers set these variables for whatever runs in their containers."""
    environment = os.environ | {"RANK": rank, "WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "sqft", "plugins"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "wanda" in done.stdout, done.stderr
