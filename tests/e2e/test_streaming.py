"""The real model, read and written one decoder block at a time, is the one that is compressed as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.safetensors import weight_files
from sqft.modeling.loading import load_model
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.transformers_io import save_model
from sqft.planning import streaming

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def compressed(model: Path, store: Path) -> Run:
    raw: dict[str, Any] = {
        "name": "streamed",
        "model": {"path": str(model), "dtype": "bfloat16"},
        "calibration": {"data": str(ROOT / "examples/quickstart/data/calibration.jsonl"), "samples": 2, "length": 128},
        "sparsify": {"scorer": "wanda", "sparsity": 0.6},
        "quantize": {"quantizer": {"name": "gptq", "options": {"group_size": 64}}, "include": ["*.k_proj", "*.v_proj"]},
    }
    orchestrator = Orchestrator(Registry.discover(), store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


def merged(model: Path, store: Path) -> Run:
    """With an adapter that was trained on the base as a whole."""
    raw: dict[str, Any] = {
        "name": "streamed",
        "model": {"path": str(model), "dtype": "bfloat16"},
        "sparsify": {"scorer": "magnitude"},
        "finetune": {
            "adapter": {"name": "nls", "options": {"ranks": [16, 8], "alpha": 32}},
            "merger": "sparsepeft",
            "targets": ["q_proj", "v_proj", "down_proj"],
            "data": str(ROOT / "examples/quickstart/data/train.jsonl"),
            "steps": 2,
            "batch_size": 2,
        },
        "merge": {},
    }
    orchestrator = Orchestrator(Registry.discover(), store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


def assert_same_model(whole: Run, streamed: Run, name: str) -> None:
    """The models of a step are the same bit for bit, in one file and in one for each block."""
    folders = [run[name].folder / "model" for run in (whole, streamed)]
    assert [len(list(folder.glob("*.safetensors"))) for folder in folders] == [1, 31]
    first, second = (dict(FolderReader(folder, weight_files(folder)).tensors()) for folder in folders)
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


def test_merging_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    save_model(*load_model(ModelSpec(ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf")), model)
    whole = merged(model, tmp_path / "whole")
    monkeypatch.setattr(streaming, "STREAM_FROM", 0)
    streamed = merged(model, tmp_path / "streamed")
    assert_same_model(whole, streamed, "merge")
    before, after = (dict(FolderReader(streamed[name].folder / "model").tensors()) for name in ("sparsify", "merge"))
    assert any(not after[name].equal(before[name]) for name in before)
    reports = [dict(run["merge"].report) for run in (whole, streamed)]
    for report in reports:
        del report["logits_difference"]  # of fewer tokens where it is streamed; the stage refuses a large one
    assert reports[0] == reports[1]


def test_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    save_model(*load_model(ModelSpec(ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf")), model)
    whole = compressed(model, tmp_path / "whole")
    monkeypatch.setattr(streaming, "STREAM_FROM", 0)
    streamed = compressed(model, tmp_path / "streamed")
    for name in ("sparsify", "quantize"):
        assert_same_model(whole, streamed, name)
        assert whole[name].report == streamed[name].report
