"""The group of commands: all are registered, and shells complete them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from sqft.cli import main


def test_every_command_of_the_folder_is_registered() -> None:
    folder = Path(__file__).parents[2] / "sqft" / "cli"
    shared = {"__init__", "group", "options", "output", "running"}
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


@pytest.mark.parametrize(
    ("words", "begun", "offered"),
    [
        (["show"], "se", ["searcher"]),
        (["show", "searcher"], "hill", ["hill-climbing"]),
        (["show", "scorer"], "hill", []),
        (["init"], "qa", ["qa-sparsepeft", "qa-sparsepeft-low-memory"]),
        (["merge", "--store", "s"], "ti", ["tiny-00000000"]),
        (["eval", "--store", "s"], "", ["other-00000000", "tiny-00000000"]),
        ([], "doc", ["doctor"]),
    ],
)
def test_a_shell_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], begun: str, offered: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-00000000", "other-00000000"):
        (tmp_path / "s" / "runs" / name).mkdir(parents=True)
        (tmp_path / "s" / "runs" / name / "recipe.json").write_text("{}")
    completions = ShellComplete(main, {}, "sqft", "_SQFT_COMPLETE").get_completions(words, begun)
    assert [item.value for item in completions] == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_own_script(shell: str) -> None:
    code = "from sqft.cli import main; main(prog_name='sqft')"
    environment = os.environ | {"_SQFT_COMPLETE": f"{shell}_source"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "_SQFT_COMPLETE" in done.stdout
