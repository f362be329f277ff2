"""SIGKILL while training, while a checkpoint is written, and while searching: the rerun ends bit for bit alike."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

DRIVER = """
import os, signal, sys
from pathlib import Path
from sqft import Orchestrator, Recipe, Registry
import sqft.modeling.training.checkpoints as resume, sqft.stages.finetune as finetune, sqft.stages.search as search

where, at = sys.argv[3], int(sys.argv[4])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if where == "step":
    original = finetune.RankSampler.on_step_begin
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == at: die()
        original(self, args, state, control, **kwargs)
    finetune.RankSampler.on_step_begin = on_step_begin
elif where == "checkpoint":  # written, but not sealed, and one file cut short as a full page cache would leave it
    def seal(folder):
        if folder.name == f"checkpoint-{at}":
            file = folder / "optimizer.pt"
            file.write_bytes(file.read_bytes()[:100])
            die()
        sealed(folder)
    sealed = resume.seal
    resume.seal = seal
elif where == "proof":  # trained to the end, not yet an artifact
    finetune.FinetuneStage.verify = lambda self: die()
elif where == "trial":
    original, done = search.SearchStage._measure, []
    def measure(self, config, records):
        if len(done) == at: die()
        done.append(config)
        return original(self, config, records)
    search.SearchStage._measure = measure
orchestrator = Orchestrator(Registry.discover(), sys.argv[2])
orchestrator.run(orchestrator.plan(Recipe.load(sys.argv[1])))
"""
Drive = Callable[..., int]


@pytest.fixture
def drive(fork_server: Any) -> Drive:
    """Runs a recipe in a store, to its end or to where it dies."""

    def run(recipe: Path, store: Path, where: str = "nowhere", at: int = 0) -> int:
        ended = fork_server.run(recipe, store, where, at, code=DRIVER)
        assert ended.status in (0, -signal.SIGKILL), ended.said
        return int(ended.status)

    return run


def only(store: Path, stage: str) -> Path:
    (folder,) = (store / "artifacts").glob(f"{stage}-*")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"store": tmp_path_factory.mktemp("whole")}


@pytest.mark.parametrize(
    ("where", "at", "resumed"),
    [("step", 3, "checkpoint-2"), ("checkpoint", 4, "checkpoint-2"), ("proof", 0, "checkpoint-7"), ("trial", 2, None)],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    raw: dict[str, Any],
    drive: Drive,
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    where: str,
    at: int,
    resumed: str | None,
) -> None:
    raw.pop("evaluate")
    raw["finetune"] |= {"schedule": "constant", "steps": 7}  # one step too many would show; none is saved at 7 by rule
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    whole = uninterrupted["store"]
    if not list(whole.iterdir()):
        assert drive(recipe, whole) == 0
    store = tmp_path / "store"
    assert drive(recipe, store, where, at) == -signal.SIGKILL
    stage = "search" if where == "trial" else "finetune"
    assert not list((store / "artifacts").glob(f"{stage}-*"))
    assert drive(recipe, store) == 0
    for stage, file in (("finetune", "deltas.safetensors"), ("merge", "model/model.safetensors")):
        expected, found = load_file(only(whole, stage) / file), load_file(only(store, stage) / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (only(whole, "search") / "trials.jsonl").read_text() == (only(store, "search") / "trials.jsonl").read_text()
    report = json.loads((only(store, "finetune") / "manifest.json").read_text())["report"]
    assert report["resumed_from"] == resumed and report["steps"] == 7


def test_checkpoints_hold_only_what_trains(raw: dict[str, Any], drive: Drive, tmp_path: Path) -> None:
    raw.pop("evaluate")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    drive(recipe, tmp_path / "store", "step", 3)
    (checkpoint,) = (tmp_path / "store" / "artifacts").glob(".partial-finetune-*/checkpoints/checkpoint-2")
    names = set(load_file(checkpoint / "model.safetensors"))
    assert names and all(".delta." in name for name in names)
    assert not (checkpoint / "training_args.bin").exists()


@pytest.mark.parametrize(("where", "at"), [("step", 5), ("proof", 0)], ids=["before it stops", "after"])
def test_early_stopping_survives_a_kill(
    raw: dict[str, Any], drive: Drive, data: Path, tmp_path: Path, where: str, at: int
) -> None:
    """The best deltas and the looks without a better one lie in the checkpoint: by then nothing else knows them."""
    raw.pop("evaluate")
    ruinous = {"steps": 30, "learning_rate": 0.3, "schedule": "constant", "save_every": 1}
    raw["finetune"] |= {**ruinous, "validation": str(data / "validation.jsonl"), "evaluate_every": 1, "patience": 4}
    recipe, whole, store = tmp_path / "recipe.json", tmp_path / "whole", tmp_path / "store"
    recipe.write_text(json.dumps(raw))
    assert drive(recipe, whole) == 0
    assert drive(recipe, store, where, at) == -signal.SIGKILL
    assert drive(recipe, store) == 0
    reports = [json.loads((only(s, "finetune") / "manifest.json").read_text())["report"] for s in (whole, store)]
    assert reports[0]["best_step"] < 5 <= reports[0]["steps"] < 30 and reports[1]["resumed_from"]
    for name in ("best_step", "steps", "validation_losses"):
        assert reports[0][name] == reports[1][name]
    files = [load_file(only(s, "finetune") / "deltas.safetensors") for s in (whole, store)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
