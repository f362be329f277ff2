"""Narrow layers by their shapes: those of real models, and tiny ones that are like them."""

from __future__ import annotations

import pytest

from sqft.checkpoints.narrow import narrow_layers
from sqft.types import LinearShape

A, B = "model.layers.0.linear_attn.in_proj_a", "model.layers.0.linear_attn.in_proj_b"


def module(name: str, **shapes: tuple[int, int]) -> list[LinearShape]:
    return [LinearShape(f"model.layers.0.{name}.{layer}", *shape) for layer, shape in shapes.items()]


def linear_attention(hidden: int, heads: int) -> list[LinearShape]:
    wide = {"in_proj_qkv": (4 * hidden, hidden), "in_proj_z": (2 * hidden, hidden), "out_proj": (hidden, 2 * hidden)}
    return module("linear_attn", **wide, in_proj_a=(heads, hidden), in_proj_b=(heads, hidden))


@pytest.mark.parametrize(
    ("hidden", "heads"),
    [(1024, 16), (2048, 16), (2560, 32), (4096, 32), (5120, 48), (2048, 32), (3072, 64), (4096, 64), (32, 2)],
)
def test_inputs_of_linear_attention(hidden: int, heads: int) -> None:
    """Qwen3.5 from 0.8B to 397B, and a tiny model of the same proportions."""
    assert narrow_layers(linear_attention(hidden, heads)) == (A, B)


@pytest.mark.parametrize(
    ("what", "layers", "expected"),
    [
        ("Qwen3-Next", module("linear_attn", in_proj_qkvz=(12288, 2048), in_proj_ba=(64, 2048)), ["in_proj_ba"]),
        ("Kimi-Linear", module("self_attn", b_proj=(32, 2304), f_a_proj=(128, 2304), f_b_proj=(4096, 128)), ["b_proj"]),
        ("an indexer", module("self_attn.indexer", wq_b=(8192, 1536), weights_proj=(64, 7168)), ["weights_proj"]),
        ("DeepSeek-V3", module("self_attn", kv_a_proj_with_mqa=(576, 7168), kv_b_proj=(32768, 512)), []),
        ("Mamba, 130 M", module("mixer", x_proj=(80, 1536), dt_proj=(1536, 48), out_proj=(768, 1536)), []),
        ("Gemma 3n", module("laurel", linear_left=(64, 2048), linear_right=(2048, 64)), []),
        ("one head for keys", module("self_attn", q_proj=(2048, 2048), k_proj=(256, 2048), v_proj=(256, 2048)), []),
        ("one head, narrow", module("self_attn", q_proj=(6144, 6144), k_proj=(128, 6144), v_proj=(128, 6144)), []),
        ("SmolLM2-135M", module("self_attn", q_proj=(576, 576), k_proj=(192, 576), v_proj=(192, 576)), []),
        ("an expert", module("mlp.experts.0", up_proj=(64, 2048), down_proj=(2048, 64)), []),
        ("tiny", module("self_attn", q_proj=(32, 32), k_proj=(8, 32), o_proj=(32, 32)), []),
        ("tiny, four heads", module("linear_attn", in_proj_qkv=(96, 32), in_proj_a=(4, 32)), []),
    ],
)
def test_other_layers(what: str, layers: list[LinearShape], expected: list[str]) -> None:
    assert [name.rpartition(".")[2] for name in narrow_layers(layers)] == expected, what


@pytest.mark.parametrize(("head", "expected"), [(64, ["g_proj"]), (128, ["k_proj", "v_proj", "g_proj"])])
def test_a_layer_that_fills_a_head_is_none(head: int, expected: list[str]) -> None:
    """Keys and values of one head, and a gate of 16 heads, are told apart by the size of a head."""
    layers = module("self_attn", q_proj=(1024, 1024), k_proj=(64, 1024), v_proj=(64, 1024), g_proj=(16, 1024))
    found = narrow_layers(layers, {"model.layers.0.self_attn": head})
    assert [name.rpartition(".")[2] for name in found] == expected
