"""Two processes with gloo: one adapter, that of one process; killed and failing runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.slow

DRIVER = """
import os, signal, sys
import sqft.stages.finetune as finetune
from sqft.cli import main
from sqft.errors import StageError

what, rank, at = sys.argv.pop(1).split(":")
begin = finetune.RankSampler.on_step_begin

def on_step_begin(self, args, state, control, **kwargs):
    begin(self, args, state, control, **kwargs)
    with open(f"ranks-{os.environ.get('RANK', 0)}", "a") as stream:
        ranks = [layer.rank for layer in self.adapted.layers.values()]
        stream.write(f"{state.global_step} {ranks}\\n")
    if (os.environ.get("RANK"), str(state.global_step)) == (rank, at):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise StageError("made to fail")

finetune.RankSampler.on_step_begin = on_step_begin
main()
"""


def drive(folder: Path, store: str, count: int, what: str = "::") -> subprocess.CompletedProcess[str]:
    (folder / "driver.py").write_text(DRIVER)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, "driver.py", what, "run", "recipe.json", "--store", store]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=250)


def deltas(folder: Path, store: str) -> dict[str, Tensor]:
    (found,) = folder.glob(f"{store}/artifacts/finetune-*")
    return load_file(found / "deltas.safetensors")


@pytest.fixture
def folder(raw: dict[str, Any], data: Path, tmp_path: Path) -> Path:
    """A recipe of two epochs of 13 batches; neither the batch, the epoch nor the validation can be divided by two."""
    raw.pop("evaluate")
    raw["finetune"] |= {"steps": None, "epochs": 2, "batch_size": 5, "save_every": 4}
    raw["finetune"]["data"] = {"path": raw["finetune"]["data"], "limit": 61}
    raw["finetune"] |= {"validation": {"path": str(data / "validation.jsonl"), "limit": 7}, "evaluate_every": 5}
    raw["finetune"] |= {"patience": 6, "loss_chunk": 3, "teacher": "dense"}
    (tmp_path / "recipe.json").write_text(json.dumps(raw))
    return tmp_path


@pytest.mark.timeout(900)
def test_two_processes_make_what_one_makes_killed_or_not(folder: Path) -> None:
    assert drive(folder, "one", 1).returncode == 0
    whole = drive(folder, "two", 2)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("[2/4] finetune\n") == 1 and whole.stdout.count("result: ") == 1
    assert (folder / "ranks-0").read_text().splitlines()[26:] == (folder / "ranks-1").read_text().splitlines()
    one, two = deltas(folder, "one"), deltas(folder, "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    made, searched = (
        [json.loads(next(folder.glob(f"{s}/artifacts/{stage}-*/manifest.json")).read_text()) for s in ("one", "two")]
        for stage in ("finetune", "search")
    )
    for manifests in (made, searched):
        assert [manifest["processes"] for manifest in manifests] == [1, 2]
    assert searched[1]["report"]["trials"] == searched[0]["report"]["trials"] == 3
    assert searched[1]["report"]["value"] == pytest.approx(searched[0]["report"]["value"], rel=1e-3)
    looks = [manifest["report"]["validation_losses"] for manifest in made]
    assert len(looks[0]) == 6 and looks[1] == pytest.approx(looks[0], rel=1e-4)

    assert drive(folder, "killed", 2, "kill:1:18").returncode != 0
    assert not list(folder.glob("killed/artifacts/finetune-*"))
    again = drive(folder, "killed", 2)
    assert again.returncode == 0, again.stderr
    assert "resuming fine-tuning from checkpoint-16" in again.stdout
    killed = deltas(folder, "killed")
    assert all(torch.equal(two[name], killed[name]) for name in two)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_in_one_process_ends_all_with_one_message(folder: Path, rank: int) -> None:
    done = drive(folder, "store", 2, f"raise:{rank}:3")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == done.stderr.count("error: made to fail") == 1
