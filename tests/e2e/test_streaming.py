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


def test_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    save_model(*load_model(ModelSpec(ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf")), model)
    whole = compressed(model, tmp_path / "whole")
    monkeypatch.setattr(streaming, "STREAM_FROM", 0)
    streamed = compressed(model, tmp_path / "streamed")
    for name in ("sparsify", "quantize"):
        folders = [run[name].folder / "model" for run in (whole, streamed)]
        assert [len(list(folder.glob("*.safetensors"))) for folder in folders] == [1, 31]
        first, second = (dict(FolderReader(folder, weight_files(folder)).tensors()) for folder in folders)
        assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
        assert whole[name].report == streamed[name].report
