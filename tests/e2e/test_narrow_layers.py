"""Inputs of linear attention that are too narrow to prune or to quantize: left out, or the plan says how."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.errors import RecipeError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LINEAR = {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
NARROW = [f"model.layers.0.linear_attn.in_proj_{which}" for which in "ab"]


def recipe(heads: int, tokenizer: Any, data: Path, folder: Path) -> dict[str, Any]:
    """Qwen3.5's text model with one block of linear attention, of so many heads, and one of full attention."""
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 1}
    kinds = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config = Qwen3_5TextConfig(**common, **SIZES, **LINEAR, **kinds, linear_num_value_heads=heads, pad_token_id=1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "name": "narrow",
        "model": {"path": str(folder)},
        "calibration": {"data": str(data / "calibration.jsonl"), "samples": 4, "length": 32},
        "sparsify": {"scorer": "wanda"},
        "quantize": {"quantizer": {"name": "gptq", "options": {"group_size": 32}}},
    }


def run(raw: dict[str, Any], registry: Registry, store: Path) -> Run:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


def test_the_plan_proposes_the_exclusion_that_mends_it(
    registry: Registry, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    """Four outputs are not narrow for 32 inputs, and fill no word of 32 bits."""
    raw = recipe(4, tokenizer, data, tmp_path / "model")
    with pytest.raises(RecipeError) as caught:
        run(raw, registry, tmp_path / "store")
    (proposed,) = re.findall(r'"exclude": (\[.*?\])', str(caught.value))
    raw["quantize"]["exclude"] = json.loads(proposed)
    assert raw["quantize"]["exclude"] == ["*.in_proj_a", "*.in_proj_b"]
    finished = run(raw, registry, tmp_path / "store")
    sparse, codes = (load_file(finished[step].folder / "model/model.safetensors") for step in ("sparsify", "quantize"))
    for name in NARROW:
        assert (sparse[f"{name}.weight"] == 0).float().mean() == 0.5
        assert torch.equal(codes[f"{name}.weight"], sparse[f"{name}.weight"])
    assert "model.layers.0.linear_attn.in_proj_qkv.qweight" in codes
    settings = json.loads((finished["quantize"].folder / "model/config.json").read_text())["quantization_config"]
    left_out = [pattern.removeprefix("-:") for pattern in settings["dynamic"]]
    assert {name for name in NARROW if any(re.match(pattern, name) for pattern in left_out)} == set(NARROW)
    assert not any(re.match(pattern, "model.layers.0.linear_attn.in_proj_qkv") for pattern in left_out)


def test_narrow_layers_stay_as_they_are(registry: Registry, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    """Two outputs are narrow for 32 inputs; named, they are taken."""
    raw = recipe(2, tokenizer, data, tmp_path / "model")
    dense = load_file(tmp_path / "model/model.safetensors")
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    for stage in ("sparsify", "quantize"):
        said = f"{stage}.include: leaves out 2 narrow layers (in_proj_a, in_proj_b: at most 64 outputs"
        assert [note for note in plan.notes if note.startswith(said)]
    finished = run(raw, registry, tmp_path / "store")
    codes = load_file(finished["quantize"].folder / "model/model.safetensors")
    assert all(torch.equal(codes[f"{name}.weight"], dense[f"{name}.weight"]) for name in NARROW)
    assert finished["sparsify"].report["sparsity"] == pytest.approx(0.5)
    del raw["quantize"]
    raw["sparsify"]["include"] = ["*", "in_proj_[ab]"]
    sparse = load_file(run(raw, registry, tmp_path / "store")["sparsify"].folder / "model/model.safetensors")
    assert all((sparse[f"{name}.weight"] == 0).float().mean() == 0.5 for name in NARROW)
