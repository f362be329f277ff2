"""gpt-oss as published, in MXFP4, from its checkpoint to a merged model that stock transformers opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import pack_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig

from sqft import Orchestrator, Recipe, Registry, Run

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}


@pytest.fixture
def recipe(tokenizer: Any, data: Path, tmp_path: Path) -> dict[str, Any]:
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**common, **SIZES, **MIXTURE, pad_token_id=1))
    model.bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return {
        "name": "gpt-oss",
        "model": {"path": str(tmp_path / "model"), "dequantize": True},
        "calibration": {"data": str(data / "calibration.jsonl"), "samples": 4, "length": 32},
        "sparsify": {"scorer": "wanda"},
        "finetune": {
            "adapter": {"name": "nls", "options": {"ranks": [4, 2], "alpha": 16}},
            "merger": "sparsepeft",
            "targets": ["*"],
            "data": str(data / "train.jsonl"),
            "steps": 3,
            "batch_size": 4,
            "learning_rate": 0.05,
        },
        "merge": {},
    }


def run(raw: dict[str, Any], registry: Registry, store: Path) -> Run:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


def test_mxfp4_becomes_sparse_floats(recipe: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    floats = pack_folder(tmp_path / "model", "mxfp4")
    finished = run(recipe, registry, tmp_path / "store")
    sparse, merged = (load_file(finished[step].folder / "model/model.safetensors") for step in ("sparsify", "merge"))
    assert sparse.keys() == merged.keys() == floats.keys()
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{name}"
        kept = sparse[name] != 0
        assert ((~kept).sum(1) == kept.shape[1] // 2).all()  # [experts, in, out]: half of the inputs of each output
        assert torch.equal(sparse[name][kept], floats[name].bfloat16()[kept]) and not merged[name][~kept].any()
    config = json.loads((finished["merge"].folder / "model/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(finished["merge"].folder / "model", dtype=torch.float32)(
            ids
        ).logits
        own = finished["merge"].load_model().float()(ids).logits
    torch.testing.assert_close(own, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("apart", [True, False])
def test_experts_as_codes_or_as_they_are(
    recipe: dict[str, Any], registry: Registry, tmp_path: Path, apart: bool
) -> None:
    """With codes each expert is stored by itself, since the original's joined tensors have no place for them."""
    floats = pack_folder(tmp_path / "model", "mxfp4")
    recipe["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    recipe["quantize"]["exclude"] = [] if apart else ["*.experts.*"]
    recipe["finetune"] |= {"merger": "qa-sparsepeft", "targets": ["q_proj", "o_proj"]}
    finished = run(recipe, registry, tmp_path / "store")
    sparse, merged = (load_file(finished[step].folder / "model/model.safetensors") for step in ("sparsify", "merge"))
    assert "model.layers.0.self_attn.q_proj.qweight" in merged
    mixture, original = "model.layers.0.mlp.experts", sparse["model.layers.0.mlp.experts.gate_up_proj"]
    expert = finished["merge"].load_model().get_submodule(f"{mixture}.3.up_proj")
    bias = sparse[f"{mixture}.gate_up_proj_bias"][3, 1::2]
    assert torch.equal(expert.bias, bias)
    if apart:
        assert f"{mixture}.gate_up_proj" not in merged and merged[f"{mixture}.3.up_proj.bias"].equal(bias)
        assert merged[f"{mixture}.3.up_proj.qweight"].shape == (8, 32)
        assert not expert.weight[original[3, :, 1::2].T == 0].any() and expert.weight.any()
    else:
        stored = merged[f"{mixture}.gate_up_proj"]
        assert stored.shape == floats[f"{mixture}.gate_up_proj"].shape and torch.equal(stored, original)
        assert torch.equal(expert.weight, original[3, :, 1::2].T)
