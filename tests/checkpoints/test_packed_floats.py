"""Folders of MXFP4 and FP8 by their headers: what they stand for, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sqft.checkpoints.packed_floats import PackedFloats, check_dequantize, packed_floats
from sqft.errors import ArtifactError, ModelError


def config(**settings: Any) -> dict[str, Any]:
    return {"quantization_config": settings}


def weights(**settings: Any) -> dict[str, Any]:
    return {"group_0": {"weights": {"num_bits": 8, "type": "float", **settings}}}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, None),
        (config(quant_method="mxfp4", modules_to_not_convert=["lm_head"]), PackedFloats("mxfp4")),
        (config(quant_method="fp8", weight_block_size=[128, 64]), PackedFloats("fp8", (128, 64))),
        (config(quant_method="fp8", weight_block_size=None), PackedFloats("fp8")),
        (config(quant_method="fp8", expert_dtype="fp4"), None),
        (
            config(quant_method="compressed-tensors", format="float-quantized", config_groups=weights()),
            PackedFloats("fp8"),
        ),
        (
            config(
                quant_method="compressed-tensors",
                format="float-quantized",
                config_groups=weights(block_structure=[128, 128]),
            ),
            PackedFloats("fp8", (128, 128)),
        ),
        (config(quant_method="compressed-tensors", format="pack-quantized", config_groups=weights()), None),
        (config(quant_method="awq"), None),
        ({"quantization_config": "mxfp4"}, None),
    ],
)
def test_formats_are_told_by_the_config(stated: dict[str, Any], expected: PackedFloats | None) -> None:
    assert packed_floats(stated) == expected


def test_shapes_of_mxfp4() -> None:
    shapes = {
        "experts.down_proj_blocks": (4, 48, 2, 16),
        "experts.down_proj_scales": (4, 48, 2),
        "experts.down_proj_bias": (4, 48),
        "norm.weight": (64,),
    }
    assert PackedFloats("mxfp4").float_shapes(Path(), shapes) == {
        "experts.down_proj": (4, 64, 48),
        "experts.down_proj_bias": (4, 48),
        "norm.weight": (64,),
    }


def test_shapes_of_fp8() -> None:
    """Scales that belong to activations are nothing that a float model has."""
    shapes = {
        "a.weight": (130, 200),
        "a.weight_scale_inv": (2, 2),
        "a.activation_scale": (),
        "b.weight": (6, 5),
        "b.weight_scale": (6, 1),
        "b.input_scale": (1,),
        "c.gate_up_proj": (3, 6, 5),
        "c.gate_up_proj_scale_inv": (3, 1, 1),
        "norm.weight": (5,),
        "d.bias": (6,),
    }
    assert PackedFloats("fp8", (128, 128)).float_shapes(Path(), shapes) == {
        "a.weight": (130, 200),
        "b.weight": (6, 5),
        "c.gate_up_proj": (3, 6, 5),
        "norm.weight": (5,),
        "d.bias": (6,),
    }


@pytest.mark.parametrize(
    ("packed", "shapes", "words"),
    [
        (PackedFloats("mxfp4"), {"x_blocks": (2, 8, 1, 16), "x_scales": (2, 8, 2)}, "x has blocks [2, 8, 1, 16]"),
        (PackedFloats("mxfp4"), {"x_blocks": (2, 8, 1, 16)}, "x_blocks has no tensor that belongs to it"),
        (PackedFloats("fp8"), {"y.weight_scale_inv": (1, 1)}, "y.weight_scale_inv has no tensor"),
        (
            PackedFloats("fp8", (128, 128)),
            {"y.weight": (130, 5), "y.weight_scale_inv": (3, 1)},
            "y.weight is [130, 5] in FP8 with scales [3, 1], expected one of [2, 1], [130, 1]",
        ),
    ],
)
def test_parts_that_do_not_fit(packed: PackedFloats, shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        packed.float_shapes(Path("model"), shapes)
    assert str(caught.value).startswith("model: ") and words in str(caught.value)


def test_the_recipe_must_ask_for_it_where_it_can_be_done() -> None:
    packed, floats = config(quant_method="fp8"), json.loads("{}")
    check_dequantize(Path("m"), packed, True)
    check_dequantize(Path("m"), floats, False)
    check_dequantize(Path("m"), config(quant_method="gptq"), False)
    with pytest.raises(ModelError, match=r"m holds its weights in FP8; set model\.dequantize to true"):
        check_dequantize(Path("m"), packed, False)
    for other in (floats, config(quant_method="gptq"), config(quant_method="awq")):
        with pytest.raises(ModelError, match=r"m holds no weights in MXFP4 or FP8; remove model\.dequantize"):
            check_dequantize(Path("m"), other, True)
