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


def drive(
    folder: Path, store: str, count: int, what: str = "::", driver: str = DRIVER
) -> subprocess.CompletedProcess[str]:
    (folder / "driver.py").write_text(driver)
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


CALIBRATING = """
import os, signal, sys
import sqft.planning.streaming as streaming
from sqft.cli import main
from sqft.errors import StageError
from sqft.modeling.calibration.team import Team

what, rank, at = sys.argv.pop(1).split(":")
give, given = Team.give, []

def counted(self, linear):
    given.append(linear)
    if (os.environ.get("RANK"), str(len(given))) == (rank, at):
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise StageError("made to fail")
    give(self, linear)

streaming.STREAM_FROM = 0
Team.give = counted
main()
"""


@pytest.mark.timeout(900)
def test_two_processes_share_the_calibration_windows_killed_or_not(raw: dict[str, Any], tmp_path: Path) -> None:
    """One block at a time is in memory, so what was killed goes on after the last finished block."""
    for section in ("finetune", "search", "merge", "evaluate"):
        raw.pop(section)
    raw["sparsify"] |= {"updater": "least-squares", "allocator": "owl"}
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"bits": 4, "group_size": 32}}}
    raw["calibration"]["samples"] = 5
    (tmp_path / "recipe.json").write_text(json.dumps(raw))

    def models(store: str) -> list[dict[str, Tensor]]:
        folders = [next(tmp_path.glob(f"{store}/artifacts/{stage}-*")) for stage in ("sparsify", "quantize")]
        return [
            {
                name: tensor
                for file in sorted(one.glob("model/*.safetensors"))
                for name, tensor in load_file(file).items()
            }
            for one in folders
        ]

    one, two = drive(tmp_path, "one", 1, "::", CALIBRATING), drive(tmp_path, "two", 2, "::", CALIBRATING)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    for stage in ("sparsify", "quantize"):
        manifests = [
            json.loads(next(tmp_path.glob(f"{s}/artifacts/{stage}-*/manifest.json")).read_text())
            for s in ("one", "two")
        ]
        assert [manifest["processes"] for manifest in manifests] == [1, 2]
    (sparse, codes), (shared, shared_codes) = models("one"), models("two")
    for name, tensor in sparse.items():
        other = shared[name]
        assert ((other == 0) != (tensor == 0)).float().mean() < 0.01, name
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4)
    assert codes.keys() == shared_codes.keys()
    for name in codes:
        if name.endswith("scales"):
            torch.testing.assert_close(shared_codes[name], codes[name], rtol=1e-2, atol=1e-4)

    assert drive(tmp_path, "killed", 2, "kill:1:20", CALIBRATING).returncode != 0
    again = drive(tmp_path, "killed", 2, "::", CALIBRATING)
    assert again.returncode == 0, again.stderr
    for whole, resumed in zip(models("two"), models("killed"), strict=True):
        assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())


def test_too_few_windows_are_calibrated_by_the_first_process_alone(raw: dict[str, Any], tmp_path: Path) -> None:
    for section in ("finetune", "search", "merge", "evaluate"):
        raw.pop(section)
    raw["calibration"]["samples"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(raw))
    done = drive(tmp_path, "store", 2, "::", CALIBRATING)
    assert done.returncode == 0, done.stderr
    assert "sparsify: made by the first process alone: calibration.samples of 1 is too few for 2" in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_while_calibrating_ends_all_with_its_own_message(
    raw: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    for section in ("finetune", "search", "merge", "evaluate"):
        raw.pop(section)
    (tmp_path / "recipe.json").write_text(json.dumps(raw))
    done = drive(tmp_path, "store", 2, f"raise:{rank}:9", CALIBRATING)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == done.stderr.count("error: made to fail") == 1
