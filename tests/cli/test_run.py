"""`sqft run`: status, messages, outputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sqft.cli import main


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
    words = ["run", str(recipe), "--set", "sparsify.sparsity=2", "--store", str(tmp_path / "s")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert done.stderr.count("error: ") == 1
    assert "sparsify.sparsity: input should be less than 1, found 2" in done.stderr


@pytest.mark.parametrize(
    ("visible", "device", "set_to", "message"),
    [
        (None, "cuda:99", "99", "device 'cuda' cannot be used"),
        (None, "cuda", "0", "device 'cuda' cannot be used"),
        ("4,7", "cuda:1", "7", "device 'cuda' cannot be used"),
        ("4,7", "cuda:2", "4,7", "CUDA_VISIBLE_DEVICES shows 2"),
        (None, "cuda:one", None, "write cuda or cuda:N"),
        (None, "gpu", None, "device 'gpu' cannot be used"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
def test_devices(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    visible: str | None, device: str, set_to: str | None, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    done = CliRunner().invoke(main, ["run", str(recipe), "--store", str(tmp_path / "s"), "--device", device])
    assert done.exit_code == 2 and message in done.output
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == set_to


def test_what_until_leaves(recipe: Path, tmp_path: Path) -> None:
    """After fine-tuning no ranks are chosen, and the sparse model is not what was asked for."""
    store, output = ["--store", str(tmp_path / "s")], ["--output", str(tmp_path / "o")]
    tuned = CliRunner().invoke(
        main, ["run", str(recipe), *store, "--until", "finetune", "--output", str(tmp_path / "o")]
    )
    assert tuned.exit_code == 2 and "nothing to put into --output" in tuned.output
    whole = CliRunner().invoke(main, ["run", str(recipe), *store, *output])
    assert whole.exit_code == 0, whole.output
    sparse = CliRunner().invoke(main, ["run", str(recipe), *store, "--until", "sparsify"])
    assert "sparsify-" in sparse.output.split("result: ")[1]
    (report,) = tmp_path.glob("s/runs/*/report.md")
    assert "| merge |" in report.read_text()  # a shorter run does not empty the report of what stands


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(raw: dict[str, Any], tmp_path: Path, stop: signal.Signals) -> None:
    raw["finetune"]["steps"] = 100_000
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    command = [sys.executable, "-m", "sqft", "run", str(recipe), "--store", str(tmp_path / "s")]
    # Tests started in the background inherit an ignored SIGINT, and so would the command.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed, env=environment
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(
        (tmp_path / "s").glob("artifacts/.partial-finetune-*/checkpoints/*")
    ):
        time.sleep(0.2)
    process.send_signal(stop)
    try:
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler writes where it is
        raise AssertionError(f"it did not end: {process.communicate(timeout=60)[1]}") from None
    assert process.returncode == 128 + stop, errors
    assert "To continue: sqft run" in errors and "Traceback" not in errors
