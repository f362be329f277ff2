"""GPTQ checkpoints: settings that are read or rejected, the shapes behind codes, and the settings that are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.checkpoints.gptq import (
    gptq_config,
    gptq_incompatibility,
    gptq_settings,
    unpacked_shapes,
    write_gptq_config,
)
from sqft.errors import ArtifactError, ModelError
from sqft.kernels.packing import to_gptq
from sqft.types import Grid, LinearShape, Quantized

PATH = Path("model")
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}


def settings_of(**changes: Any) -> dict[str, Any] | None:
    return gptq_settings(PATH, {"quantization_config": SETTINGS | changes})


def test_settings() -> None:
    assert gptq_settings(PATH, {"model_type": "llama"}) is None
    assert settings_of() == SETTINGS
    for bits in (2, 3, 4, 8):
        assert settings_of(bits=bits, group_size=-1, checkpoint_format="gptq") is not None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "awq"}, r"model is already quantized \(awq\); .* only GPTQ checkpoints, version 1"),
        ({"checkpoint_format": "gptq_v2"}, r"already quantized \(gptq_v2\)"),
        ({"bits": 5}, "bits 5 and group_size 16; GPTQ has bits of 2, 3, 4 or 8"),
        ({"bits": True}, "bits True"),
        ({"bits": 4.0}, "bits 4.0"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": -2}, "group_size -2"),
        ({"group_size": None}, "group_size None"),
    ],
)
def test_settings_that_are_rejected(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        settings_of(**config)


@pytest.mark.parametrize("config", ["gptq", [], 4])
def test_settings_that_are_no_object(config: Any) -> None:
    with pytest.raises(ModelError, match=r"already quantized \(unknown method\)"):
        gptq_settings(PATH, {"quantization_config": config})


def layer(bits: int, out: int, inputs: int, group_size: int, act_order: bool) -> Quantized:
    groups = 1 if group_size == -1 else inputs // group_size
    index = torch.arange(inputs - 1, -1, -1, dtype=torch.int32) // (inputs // groups) if act_order else None
    codes = torch.zeros(out, inputs, dtype=torch.uint8)
    grid = Grid(torch.ones(out, groups).half(), torch.ones(out, groups).int(), group_size, bits, index)
    return Quantized(codes, grid)


def shapes_of(quantized: Quantized, name: str = "a.0.q") -> dict[str, tuple[int, ...]]:
    parts = {f"{name}.{part}": tuple(tensor.shape) for part, tensor in to_gptq(quantized).items()}
    return {"norm.weight": (64,), **parts}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("act_order", [False, True])
def test_shapes_are_those_that_packing_stores(bits: int, group_size: int, act_order: bool) -> None:
    shapes = shapes_of(layer(bits, 32, 64, group_size, act_order))
    settings = {"bits": bits, "group_size": group_size, "desc_act": act_order}
    assert unpacked_shapes(PATH, shapes, settings) == {"norm.weight": (64,), "a.0.q.weight": (32, 64)}


@pytest.mark.parametrize(
    ("part", "shape", "words"),
    [
        ("qweight", None, "a.0.q.qweight is missing"),
        ("qweight", (8,), r"qweight is \[8\], expected \[words, outputs\]"),
        ("qzeros", None, r"qzeros is missing, expected \[4, 4\]"),
        ("scales", (4, 31), r"scales is \[4, 31\], expected \[4, 32\]"),
        ("g_idx", (63,), r"g_idx is \[63\], expected \[64\]"),
    ],
)
def test_a_part_that_does_not_fit(part: str, shape: tuple[int, ...] | None, words: str) -> None:
    shapes = shapes_of(layer(4, 32, 64, 16, False)) | shapes_of(layer(4, 32, 64, 16, False), "b.0.q")
    name = f"a.0.q.{part}"
    shapes = {key: value for key, value in shapes.items() if key != name} | ({name: shape} if shape else {})
    with pytest.raises(ArtifactError, match=f"model: .*{words}; copy the model again"):
        unpacked_shapes(PATH, shapes, SETTINGS)


def test_groups_in_order_need_no_index() -> None:
    shapes = shapes_of(layer(4, 32, 64, 16, False))
    del shapes["a.0.q.g_idx"]
    assert unpacked_shapes(PATH, shapes, SETTINGS)["a.0.q.weight"] == (32, 64)
    with pytest.raises(ArtifactError, match="g_idx is missing"):
        unpacked_shapes(PATH, shapes, SETTINGS | {"desc_act": True})
    with pytest.raises(ArtifactError, match=r"there is no \.qweight tensor"):
        unpacked_shapes(PATH, {"norm.weight": (64,)}, SETTINGS)


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "words"),
    [
        ((32, 64), 4, 32, None),
        ((32, 48), 4, -1, None),
        ((32, 64), 3, 64, None),
        ((32, 60), 4, -1, "60 inputs of 4 bits do not fill the 32-bit words of a checkpoint"),
        ((20, 64), 4, 32, "20 outputs of 4 bits do not fill the 32-bit words of a checkpoint"),
        ((32, 576), 4, 128, "576 inputs are not a multiple of group_size 128, .*; sizes that fit: 64, 32, -1"),
        ((32, 40), 4, 32, "sizes that fit: -1"),
    ],
)
def test_what_a_checkpoint_can_hold(shape: tuple[int, int], bits: int, group_size: int, words: str | None) -> None:
    reason = gptq_incompatibility(LinearShape("q", *shape), bits, group_size)
    if words is None:
        assert reason is None
        to_gptq(layer(bits, *shape, group_size, False))
    else:
        assert reason is not None and re.search(words, reason)


def test_the_settings_that_are_written(tmp_path: Path) -> None:
    grids = {
        "m.layers.0.a.q": layer(4, 32, 64, 16, True).grid,
        "m.layers.1.a.q": layer(4, 32, 64, 16, False).grid,
    }
    config = gptq_config(grids, ["m.layers.0.b.down"])
    assert config == {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 16, "sym": False,
        "desc_act": True, "lm_head": False, "modules_in_block_to_quantize": [["a.q"]],
        "dynamic": {r"-:^m\.layers\.0\.b\.down$": {}},
    }  # fmt: skip
    assert "dynamic" not in gptq_config(grids, [])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_gptq_config(tmp_path, config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"model_type": "llama", "quantization_config": config}
    assert gptq_settings(tmp_path, written) == config
    known = {"bits": 4, "group_size": 16, "sym": False, "desc_act": True, "model_file_base_name": "model"}
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == known


def test_layers_that_servers_join_are_left_out_by_their_joined_name() -> None:
    """vLLM and SGLang ask for `qkv_proj`, whose parts are three layers of the folder; all or none may be floats."""
    grids = {"m.layers.1.a.q_proj": layer(4, 32, 64, 16, False).grid}
    floats = [f"m.layers.0.a.{x}_proj" for x in "qkv"] + ["m.layers.0.b.gate_proj"]
    patterns = [key.removeprefix("-:") for key in gptq_config(grids, floats)["dynamic"]]

    def left_out(name: str) -> bool:
        return any(re.match(pattern, name) for pattern in patterns)

    assert left_out("m.layers.0.a.qkv_proj") and all(map(left_out, floats))
    assert not any(map(left_out, ["m.layers.1.a.qkv_proj", "m.layers.0.b.gate_up_proj", "m.layers.0.b.down_proj"]))


def test_every_key_that_vllm_and_sglang_index_is_written() -> None:
    """`from_config` of both (0.33.0 and 0.5.23) raises without the first four, and chooses its kernel by `sym`."""
    config = gptq_config({"m.layers.0.a.q": layer(4, 32, 64, 16, False).grid}, [])
    assert {"bits", "group_size", "desc_act", "sym", "lm_head", "quant_method", "checkpoint_format"} == set(config)
    assert (type(config["desc_act"]), type(config["sym"]), type(config["lm_head"])) == (bool, bool, bool)
