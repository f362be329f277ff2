"""`mlx`: codes in MLX's affine form, read by its definition; what config.json says to mlx_lm; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sqft_mlx import Mlx
from sqft_mlx.settings import refusal_of_config, refusal_of_grid
from sqft_mlx.writer import affine
from transformers import AutoModelForCausalLM

from sqft import Orchestrator, Recipe, Registry
from sqft.api import Grid, Quantized, StageError
from sqft.errors import RecipeError
from sqft.kernels.grids import dequantize
from sqft.modeling.loading.finished_model import FinishedModel


@st.composite
def layers(draw: st.DrawFn) -> Quantized:
    bits, size, symmetric = (
        draw(st.sampled_from([2, 3, 4, 8])),
        draw(st.sampled_from([-1, 32, 64])),
        draw(st.booleans()),
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    out, inputs = draw(st.integers(1, 5)), draw(st.sampled_from([64, 192]))
    groups = 1 if size == -1 else inputs // size
    zero = torch.randint(0, 2**bits, (out, groups), generator=g)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    codes = torch.randint(0, 2**bits, (out, inputs), generator=g, dtype=torch.uint8)
    scale = (torch.randn(out, groups, generator=g) * 10.0 ** draw(st.integers(-6, 2))).half()
    return Quantized(codes, Grid(scale, zero.to(torch.uint8), size, bits, None))


@settings(max_examples=60, deadline=None)
@given(layers())
def test_every_weight_keeps_its_value(layer: Quantized) -> None:
    """Bit for bit in float32, by Python's integers, though groups are smaller in MLX; half as large where that fits."""
    found = affine(layer, 32)
    bits, (out, inputs) = layer.grid.bits, layer.codes.shape
    streams = [sum(word << (32 * place) for place, word in enumerate(row)) for row in found["weight"].long().tolist()]
    codes = torch.tensor([[(s >> (bits * k)) & (2**bits - 1) for k in range(inputs)] for s in streams])
    assert found["weight"].dtype == torch.uint32 and codes.equal(layer.codes.long())
    assert found["scales"].shape == found["biases"].shape == (out, inputs // 32)
    scale, bias = (found[part].float().repeat_interleave(32, 1) for part in ("scales", "biases"))
    assert (scale * codes + bias).equal(dequantize(layer))
    if bool((layer.grid.zero == 2 ** (bits - 1)).all()) and float(layer.grid.scale.abs().max()) < 500:
        assert found["scales"].dtype == found["biases"].dtype == torch.float16


@pytest.mark.parametrize(
    ("grid", "why"),
    [
        ({"bits": 4, "act_order": True}, "act-order have no place in MLX; add static_groups"),
        ({"bits": 4, "group_size": 16}, "MLX's groups are of 32, 64, 128 inputs, and groups of 16"),
        ({"bits": 8, "group_size": 256, "symmetric": False, "act_order": False}, None),
        ({}, None),
    ],
)
def test_grids(grid: dict[str, Any], why: str | None) -> None:
    found = refusal_of_grid(grid)
    assert found is None if why is None else why in str(found)


LLAMA: dict[str, Any] = {"model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, None),
        ({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}, None),
        ({"model_type": "phi3"}, "writes models of llama, mistral, qwen2, qwen3, and this one's model_type is phi3"),
        ({**LLAMA, "hidden_act": "gelu"}, "mlx_lm computes silu in models of llama, and this one has gelu"),
        ({"model_type": "qwen3", "attention_bias": True}, "no biases of attention in models of qwen3"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "positions that are scaled by 'yarn'"),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "cannot write partial_rotary_factor"),
        ({"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 128}, "no sliding window"),
        ({"model_type": "mistral", "sliding_window": 128, "max_position_embeddings": 128}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "max_position_embeddings": 128}, None),
    ],
)
def test_models(config: dict[str, Any], why: str | None) -> None:
    found = refusal_of_config(config)
    assert found is None if why is None else why in str(found)


def recipe(folder: Path, quantizer: dict[str, Any] | None, **options: Any) -> Recipe:
    raw: dict[str, Any] = {"name": "m", "model": {"path": str(folder)}, "sparsify": {"scorer": "magnitude"}}
    if quantizer is not None:
        raw["quantize"] = {"quantizer": {"name": "rtn", "options": quantizer}}
    return Recipe.parse(raw | {"export": [{"exporter": {"name": "mlx", "options": options}}]})


def test_a_folder_of_codes(model_folder: Path, registry: Registry, tmp_path: Path) -> None:
    """The stage's own checks pass, a tied head is not stored, and what mlx_lm indexes is in config.json."""
    orchestrator = Orchestrator(registry, tmp_path)
    run = orchestrator.run(orchestrator.plan(recipe(model_folder, {"group_size": 32}, dtype="float16")))
    tensors = load_file(run["export"].folder / "model" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape == (32, 64 * 4 // 32)
    assert "lm_head.weight" not in tensors and tensors["model.norm.weight"].dtype == torch.float16
    config = json.loads((run["export"].folder / "model" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["rope_scaling"] is None
    assert config["tie_word_embeddings"] is True and config["dtype"] == "float16" and "_name_or_path" not in config


def test_a_folder_of_floats(model_folder: Path, registry: Registry, tmp_path: Path) -> None:
    orchestrator = Orchestrator(registry, tmp_path)
    run = orchestrator.run(orchestrator.plan(recipe(model_folder, None)))
    assert "quantization" not in json.loads((run["export"].folder / "model" / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(run["export"].folder / "model").state_dict()
    assert all(stock[name].equal(value) for name, value in run["sparsify"].load_model().state_dict().items())


def test_what_the_plan_and_the_writer_refuse(
    model_folder: Path, quantized_folder: Path, registry: Registry, tmp_path: Path
) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "m").mkdir()
    for file in model_folder.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(RecipeError, match=r"export\.0\.exporter: mlx_lm computes silu"):
        Orchestrator(registry, tmp_path).plan(recipe(tmp_path / "m", {"group_size": 32}))
    with pytest.raises(StageError, match=r"export \(mlx\): model\.layers\.0\..*act-order"):
        Mlx().export(FinishedModel(quantized_folder), tmp_path / "m")
