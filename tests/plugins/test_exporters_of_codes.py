"""`gptq` and `compressed-tensors`: every grid through a folder and back, read by Python's integers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sqft_compressed_tensors import CompressedTensors
from sqft_gptq import GptqCheckpoint
from torch import Tensor

from sqft.api import Grid, Quantized
from sqft.checkpoints.model_spec import ModelSpec
from sqft.kernels.grids import dequantize, group_index, same
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.quantized import load_dequantized, read_quantized

LAYER = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
FLOATS = {"lm_head.weight": torch.ones(3, 64), DOWN: torch.ones(64, 2), NORM: torch.ones(64)}


@dataclass(frozen=True)
class OneLayer:
    """A model reader of one quantized layer and a few floats."""

    layer: Quantized
    folder: Path = Path()

    def names(self) -> Sequence[str]:
        return [f"{LAYER}.weight", *FLOATS]

    def tensor(self, name: str) -> Tensor:
        return FLOATS[name] if name in FLOATS else dequantize(self.layer)

    def floats(self) -> Sequence[str]:
        return [*FLOATS]

    def quantized(self) -> Sequence[str]:
        return [LAYER]

    def codes(self, layer: str) -> Quantized:
        assert layer == LAYER
        return self.layer

    def float_layers(self) -> Sequence[str]:
        return [DOWN.removesuffix(".weight")]

    def blocks(self) -> str:
        return "model.layers"

    def towers(self) -> Sequence[str]:
        return []

    def copy_settings(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")


@st.composite
def layers(draw: st.DrawFn) -> Quantized:
    bits, size = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([-1, 32, 64]))
    symmetric, act_order = draw(st.booleans()), draw(st.booleans())
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    out, inputs = 32, 64
    groups = 1 if size == -1 else inputs // size
    zero = torch.randint(0, 2**bits, (out, groups), generator=g, dtype=torch.int32)
    zero[0] = 0  # borrows nothing from its neighbour
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    index = torch.randperm(inputs, generator=g).int() // (inputs // groups) if act_order and groups > 1 else None
    codes = torch.randint(0, 2**bits, (out, inputs), generator=g, dtype=torch.uint8)
    return Quantized(codes, Grid(torch.rand(out, groups, generator=g).half() + 1, zero, size, bits, index))


def exported(exporter: Any, layer: Quantized, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    exporter.export(OneLayer(layer), folder)
    tensors = load_file(folder / "model.safetensors")
    assert all(tensors[name].equal(value) for name, value in FLOATS.items())
    assert f"{LAYER}.weight" not in tensors
    return tensors, json.loads((folder / "config.json").read_text())["quantization_config"]


def fields(words: Tensor, bits: int) -> Tensor:
    """The codes of each row's stream of bits, lowest first, by Python's integers."""
    rows = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(row))
        rows.append([(stream >> (bits * place)) & (2**bits - 1) for place in range(32 * len(row) // bits)])
    return torch.tensor(rows)


@settings(deadline=None, max_examples=40)
@given(layers())
def test_gptq_and_back(layer: Quantized) -> None:
    grid = layer.grid
    with TemporaryDirectory() as name:
        tensors, config = exported(GptqCheckpoint(), layer, Path(name))
        (back,) = read_quantized(Path(name)).values()
    assert same(back, layer)
    assert fields(tensors[f"{LAYER}.qzeros"], grid.bits).equal((grid.zero.T.long() - 1) % 2**grid.bits)
    assert tensors[f"{LAYER}.scales"].dtype == torch.float16
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", grid.bits, grid.group_size)
    assert config["sym"] == bool((grid.zero == 2 ** (grid.bits - 1)).all())
    assert config["desc_act"] == (grid.group_index is not None)
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
    assert list(config["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.down_proj$"]


@settings(deadline=None, max_examples=40)
@given(layers())
def test_compressed_tensors_and_back(layer: Quantized) -> None:
    """By the format's description: value = (code − zero) · scale, both packed without an offset."""
    grid, (out, inputs) = layer.grid, layer.codes.shape
    with TemporaryDirectory() as name:
        tensors, config = exported(CompressedTensors(), layer, Path(name))
    parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(LAYER)}
    weights = config["config_groups"]["group_0"]["weights"]
    assert parts["weight_shape"].tolist() == [out, inputs] and parts["weight_shape"].dtype == torch.int64
    codes = fields(parts["weight_packed"], grid.bits)
    middle = torch.full_like(grid.zero, 2 ** (grid.bits - 1)).long()
    zero = middle if weights["symmetric"] else fields(parts["weight_zero_point"].T, grid.bits).T
    assert weights["symmetric"] == ("weight_zero_point" not in parts)
    size = inputs if weights["strategy"] == "channel" else weights["group_size"]
    assert ("weight_g_idx" in parts) == (weights.get("actorder") == "group") == (grid.group_index is not None)
    index = parts.get("weight_g_idx", torch.arange(inputs) // size).long()
    assert index.equal(group_index(grid, inputs)) and codes.equal(layer.codes.long()) and zero.equal(grid.zero.long())
    value = (codes - zero[:, index]) * parts["weight_scale"].float()[:, index]
    assert value.equal(dequantize(layer))
    assert weights["num_bits"] == grid.bits and config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head", DOWN.removesuffix(".weight")]


def test_the_folder_is_a_model_in_shards(quantized_folder: Path, tmp_path: Path) -> None:
    """With its head, although that is tied, and its tokenizer."""
    GptqCheckpoint(max_shard_size="20KB").export(FinishedModel(quantized_folder), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" in index["weight_map"] and len(set(index["weight_map"].values())) > 1
    one, other = (
        load_dequantized(ModelSpec(tmp_path)).state_dict(),
        load_dequantized(ModelSpec(quantized_folder)).state_dict(),
    )
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert (tmp_path / "tokenizer.json").is_file()
    own = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, quantized_folder)]
    assert own[0] == own[1]
    own = [json.loads((folder / "quantize_config.json").read_text()) for folder in (tmp_path, quantized_folder)]
    assert own[0] == own[1]


@pytest.mark.parametrize("exporter", [GptqCheckpoint(), CompressedTensors()], ids=lambda e: e.name)
def test_they_need_codes(exporter: Any) -> None:
    assert exporter.needs_codes
