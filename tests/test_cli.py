"""The commands as a user types them: statuses, messages, outputs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sqft.cli import main


@pytest.fixture
def recipe(raw: dict[str, Any], tmp_path: Path) -> Path:
    raw["evaluate"]["of"] = ["sparsify", "merge"]
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(raw))
    return file


def test_plugins_and_show() -> None:
    listed = CliRunner().invoke(main, ["plugins"])
    assert listed.exit_code == 0 and "hill-climbing" in listed.output
    rows = json.loads(CliRunner().invoke(main, ["plugins", "--json"]).output)
    assert {"kind", "name", "plugin", "provider", "summary"} == set(rows[0])
    shown = CliRunner().invoke(main, ["show", "searcher", "hill-climbing"])
    assert "turns: integer, >= 1, default 3" in shown.output
    wrong = CliRunner().invoke(main, ["show", "scorer", "wnda"])
    assert wrong.exit_code == 2 and "Did you mean 'wanda'?" in wrong.output


def test_schema_knows_the_plugins() -> None:
    schema = json.loads(CliRunner().invoke(main, ["schema"]).output)
    text = json.dumps(schema["$defs"]["Search"]["properties"]["searcher"])
    assert '"turns"' in text and '"heuristic"' in text


def test_plan_touches_nothing(recipe: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["plan", str(recipe), "--store", str(tmp_path / "s")])
    assert done.exit_code == 0 and "finetune" in done.output and "run" in done.output
    assert not (tmp_path / "s").exists()


def test_run_prints_a_table_and_how_to_load(recipe: Path, tmp_path: Path) -> None:
    arguments = ["run", str(recipe), "--store", str(tmp_path / "s"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "AutoModelForCausalLM.from_pretrained" in done.output
    assert "| merge | " in done.output  # whole lines where there is no terminal
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "out" / "tokenizer.json").is_file()
    (folder,) = (tmp_path / "s" / "runs").iterdir()
    names = {"recipe.json", "plan.json", "run.json", "report.json", "report.md", "run.log"}
    assert names == {file.name for file in folder.iterdir()}
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2 and "not an empty folder" in again.output


def test_a_mistake_is_one_message(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sqft", "run", str(recipe), "--set", "sparsify.sparsity=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "sparsify.sparsity: input should be less than 1, found 2" in done.stderr
    assert "Traceback" not in done.stderr
    device = CliRunner().invoke(main, ["run", str(recipe), "--store", str(tmp_path / "s"), "--device", "cuda:99"])
    assert device.exit_code == 2 and "device 'cuda:99' cannot be used" in device.output


def test_ctrl_c_says_how_to_go_on(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["finetune"]["steps"] = 100_000
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    command = [sys.executable, "-m", "sqft", "run", str(recipe), "--store", str(tmp_path / "s")]
    # Tests started in the background inherit an ignored SIGINT, and so would the command.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(
        (tmp_path / "s").glob("artifacts/.partial-finetune-*/checkpoints/*")
    ):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "To go on: sqft run" in errors and "Traceback" not in errors
