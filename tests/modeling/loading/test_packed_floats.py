"""Folders of MXFP4 and FP8, loaded as the floats that they stand for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_checkpoints import pack_folder
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ModelError
from sqft.modeling.architecture.linears import as_stored
from sqft.modeling.loading import load_model
from sqft.modeling.loading.packed_floats import read_packed_floats
from sqft.modeling.loading.transformers_io import save_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 256}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
RANKS = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MODELS: dict[str, tuple[str, type[PretrainedConfig], dict[str, Any]]] = {
    "gpt-oss": ("mxfp4", GptOssConfig, {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}),
    "Qwen 3": ("fp8", Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16}),
    "Qwen 3 MoE": (
        "fp8",
        Qwen3MoeConfig,
        {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, **MIXTURE},
    ),
    "DeepSeek V3": (
        "fp8",
        DeepseekV3Config,
        {"num_key_value_heads": 4, "n_routed_experts": 4} | RANKS | GROUPS | MIXTURE,
    ),
}


def pack(name: str, tokenizer: Any, folder: Path) -> tuple[Path, Path]:
    """A packed model, and the same model in floats."""
    method, kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **SIZES, **COMMON, **sizes))
    packed, floats = folder / "packed", folder / "floats"
    model.save_pretrained(packed)
    tokenizer.save_pretrained(packed)
    shutil.copytree(packed, floats)
    save_file(pack_folder(packed, method, (32, 32)), floats / "model.safetensors", metadata={"format": "pt"})
    return packed, floats


@pytest.fixture(params=MODELS)
def packed(request: pytest.FixtureRequest, tokenizer: Any, tmp_path: Path) -> tuple[Path, Path]:
    return pack(request.param, tokenizer, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_are_those_of_the_format(packed: tuple[Path, Path], dtype: str) -> None:
    folder, floats = packed
    model = load_model(ModelSpec(folder, dtype, dequantize=True))[0]
    expected = AutoModelForCausalLM.from_pretrained(floats, dtype=getattr(torch, dtype)).state_dict()
    found = as_stored(model)
    assert found.keys() == expected.keys() and {tensor.dtype for tensor in found.values()} <= {
        getattr(torch, dtype),
        torch.float32,
    }
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_it_is_written_as_ordinary_floats(packed: tuple[Path, Path], tmp_path: Path) -> None:
    """Under the original's names, so that experts are one by one again where they were."""
    folder, floats = packed
    save_model(*load_model(ModelSpec(folder, "float32", dequantize=True)), tmp_path / "written")
    assert "quantization_config" not in json.loads((tmp_path / "written/config.json").read_text())
    written, expected = load_file(tmp_path / "written/model.safetensors"), load_file(floats / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


LAYER = "model.layers.1.mlp.up_proj.weight"


def test_a_scale_may_be_a_bare_exponent(tokenizer: Any, tmp_path: Path) -> None:
    folder, _ = pack("Qwen 3", tokenizer, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    scales = torch.full_like(tensors[f"{LAYER}_scale_inv"], 125, dtype=torch.uint8)
    save_file(tensors | {f"{LAYER}_scale_inv": scales}, folder / "model.safetensors")
    assert read_packed_floats(folder, torch.float32)[LAYER][...].equal(tensors[LAYER].float() / 4)


@pytest.mark.parametrize(
    ("dtype", "scaled", "words"),
    [
        (torch.int8, True, f"{LAYER} has scales and is int8, expected float8"),
        (torch.float8_e4m3fn, False, f"{LAYER} is float8 without a scale"),
    ],
)
def test_what_cannot_be_dequantized_is_named(
    tokenizer: Any, tmp_path: Path, dtype: torch.dtype, scaled: bool, words: str
) -> None:
    folder, _ = pack("Qwen 3", tokenizer, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[LAYER] = tensors[LAYER].float().to(dtype)
    if not scaled:
        del tensors[f"{LAYER}_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=re.escape(words)):
        load_model(ModelSpec(folder, "float32", dequantize=True))
