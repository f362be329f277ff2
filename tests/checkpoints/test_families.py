"""Linear layers guessed from the names and shapes of checkpoints of several families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sqft.checkpoints.families import guess_linears
from sqft.checkpoints.model_source import ModelSource
from sqft.types import LinearShape

MIXTRAL = "model.layers.0.block_sparse_moe"


@pytest.mark.parametrize(
    ("family", "shapes", "expected"),
    [
        ("gpt2", {"transformer.h.0.attn.c_attn.weight": (4, 12)}, [("transformer.h.0.attn.c_attn", 12, 4)]),
        ("gpt2", {"h.0.mlp.c_fc.weight": (4, 16), "wte.weight": (9, 4)}, [("transformer.h.0.mlp.c_fc", 16, 4)]),
        ("opt", {"decoder.layers.0.fc1.weight": (8, 4)}, [("model.decoder.layers.0.fc1", 8, 4)]),
        (
            "mixtral",
            {f"{MIXTRAL}.gate.weight": (2, 4), f"{MIXTRAL}.experts.1.w1.weight": (8, 4)},
            [("model.layers.0.mlp.experts.1.gate_proj", 8, 4)],
        ),
        (
            "mixtral",
            {f"{MIXTRAL}.experts.0.w2.weight": (4, 8), f"{MIXTRAL}.experts.0.w3.weight": (8, 4)},
            [("model.layers.0.mlp.experts.0.down_proj", 4, 8), ("model.layers.0.mlp.experts.0.up_proj", 8, 4)],
        ),
        (
            "granite",
            {"model.layers.0.mlp.experts.gate_up_proj": (2, 16, 4), "model.layers.0.mlp.experts.down_proj": (2, 4, 8)},
            [
                (f"model.layers.0.mlp.experts.{index}.{name}", *shape)
                for index in range(2)
                for name, shape in (("down_proj", (4, 8)), ("gate_proj", (8, 4)), ("up_proj", (8, 4)))
            ],
        ),
        (
            "granitemoe",
            {
                f"{MIXTRAL}.{name}.weight": shape
                for name, shape in (
                    ("input_linear", (1, 16, 4)),
                    ("output_linear", (1, 4, 8)),
                    ("router.layer", (1, 4)),
                )
            },
            [
                (f"{MIXTRAL}.experts.0.{name}", *shape)
                for name, shape in (("down_proj", (4, 8)), ("gate_proj", (8, 4)), ("up_proj", (8, 4)))
            ],
        ),
        ("jetmoe", {"model.layers.0.mlp.router.layer.weight": (2, 4)}, []),
        (
            "gpt_oss",  # with biases it is none that sqft takes apart
            {
                f"model.layers.0.mlp.experts.down_proj{end}": shape
                for end, shape in (("", (2, 4, 8)), ("_bias", (2, 4)))
            },
            [],
        ),
    ],
)
def test_a_family(family: str, shapes: dict[str, tuple[int, ...]], expected: list[tuple[str, int, int]]) -> None:
    assert guess_linears(shapes, family) == tuple(LinearShape(*layer) for layer in expected)


def test_codes_of_a_transposed_family_are_not_transposed() -> None:
    shapes = {"transformer.h.0.attn.c_attn.weight": (12, 4)}
    assert guess_linears(shapes, "gpt2", packed=True) == (LinearShape("transformer.h.0.attn.c_attn", 12, 4),)


@pytest.mark.parametrize(
    ("name", "shape", "taken"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 4), True),
        ("model.layers.10.mlp.experts.3.up_proj.weight", (8, 4), True),
        ("transformer.h.0.mlp.0.weight", (8, 4), True),
        ("model.embed_tokens.weight", (8, 4), False),
        ("model.layers.61.embed_tokens.weight", (8, 4), False),
        ("lm_head.weight", (8, 4), False),
        ("model.layers.0.input_layernorm.weight", (8,), False),
        ("model.layers.0.self_attn.q_norm.weight", (8,), False),
        ("model.layers.0.self_attn.q_proj.bias", (8,), False),
        ("model.layers.0.mixer.conv1d.weight", (8, 1, 4), False),
        ("model.layers.0.mlp.experts.weight", (2, 8, 4), False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), False),
    ],
)
def test_linears_are_guessed(
    folder: Path, name: str, shape: tuple[int, ...], taken: bool, find: Callable[..., ModelSource]
) -> None:
    save_file({name: torch.zeros(shape)}, folder / "model.safetensors")
    expected = (LinearShape(name.removesuffix(".weight"), 8, 4),) if taken else ()
    assert find(folder).linears == expected


def test_linears_come_in_the_order_of_their_numbers(folder: Path, find: Callable[..., ModelSource]) -> None:
    names = ["m.layers.2.a.q", "m.layers.2.b.q", "m.layers.10.a.q", "m.layers.more.0.a.q", "m.vision.3.q"]
    save_file({f"{name}.weight": torch.zeros(2, 2) for name in names[::-1]}, folder / "model.safetensors")
    found = [linear.name for linear in find(folder).linears]
    assert set(found) == set(names)
    assert [name for name in found if "layers" in name and "more" not in name] == names[:3]
