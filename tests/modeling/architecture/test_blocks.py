"""Which modules are decoder blocks, and which of their linear layers sqft works on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from multimodal_models import FAMILIES, gemma4
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma4TextConfig,
    JambaConfig,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
    MuseSparkTextConfig,
    PreTrainedModel,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from sqft.errors import ModelError
from sqft.kernels.grids import fit_grid
from sqft.modeling.adapters.frozen_weight import PackedLinear, PackedWeight
from sqft.modeling.architecture.blocks import all_linears, decoder_blocks, linears, shape_of, text_model, towers
from sqft.modeling.architecture.linears import as_linears
from sqft.types import Grid, LinearShape, Quantized

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def make(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def test_more_experts_than_blocks() -> None:
    model = as_linears(make(MixtralConfig(vocab_size=99, num_hidden_layers=2, num_local_experts=5, **SIZES)))
    assert list(decoder_blocks(model)) == ["model.layers.0", "model.layers.1"]
    names = [name.removeprefix("model.layers.1.") for name in linears(model) if name.startswith("model.layers.1.")]
    assert len(names) == 4 + 5 * 3
    assert not any("gate." in name or name.endswith(".gate") for name in names)


def test_blocks_of_two_kinds_in_one_list() -> None:
    kinds = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    model = as_linears(
        make(JambaConfig(vocab_size=99, num_hidden_layers=4, num_experts=9, mamba_d_state=4, **kinds, **SIZES))
    )
    assert len({type(block) for block in decoder_blocks(model).values()}) == 2
    assert list(decoder_blocks(model)) == [f"model.layers.{index}" for index in range(4)]


def test_a_router_is_no_linear_layer() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2, "kv_channels": 8}
    model = make(JetMoeConfig(vocab_size=99, num_hidden_layers=1, num_local_experts=4, **sizes))
    assert isinstance(model.model.layers[0].mlp.router.layer, nn.Linear)
    assert not [name for name in linears(model) if "router" in name]
    assert "model.layers.0.self_attention.kv_proj" in linears(model)  # beside the experts of its attention


def mixture(kind: str) -> nn.Module:
    """Experts fused in a tensor, taken apart, in a list, or in a form that does not show their number."""
    if kind == "unknown":
        return nn.Linear(16, 5 * 24)
    if kind == "list":
        return nn.ModuleList([nn.ReLU()] * 5)
    fused = nn.Sequential(MixtralExperts(MixtralConfig(num_local_experts=5, **SIZES)))
    return (as_linears(fused) if kind == "apart" else fused)[0]


@pytest.mark.parametrize("kind", ["fused", "apart", "list", "unknown"])
def test_layers_beside_experts(kind: str) -> None:
    """A router gives a number for each expert, or one; another layer is a router only where experts are not counted."""
    block = nn.ModuleDict({"experts": mixture(kind), "gate": nn.Linear(16, 5), "shared_gate": nn.Linear(16, 1)})
    block.update({"into": nn.Linear(16, 8), "out_of": nn.Linear(8, 16)})
    found = linears(nn.ModuleDict({"h": nn.ModuleList([block])}))
    assert [name for name in ("gate", "shared_gate", "into", "out_of") if f"h.0.{name}" in found] == (
        [] if kind == "unknown" else ["into", "out_of"]
    )


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            MuseSparkTextConfig(
                vocab_size=99, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, moe_hidden_size=12,
                moe_intermediate_size=12, head_dim=8, **SIZES,
            ),
            {"pre_expert_proj", "post_expert_proj"},
        ),
        (
            Gemma4TextConfig(
                vocab_size=99, num_hidden_layers=1, num_experts=4, top_k_experts=2, moe_intermediate_size=12,
                enable_moe_block=True, hidden_size_per_layer_input=12, vocab_size_per_layer_input=99, head_dim=8,
                num_kv_shared_layers=0, global_head_dim=8, layer_types=["full_attention"], **SIZES,
            ),
            {"per_layer_input_gate", "per_layer_projection"},
        ),
    ],
    ids=["MuseSpark", "Gemma4"],
)  # fmt: skip
def test_projections_beside_experts_are_no_routers(config: Any, expected: set[str], apart: bool) -> None:
    with torch.device("meta"):
        text = AutoModel.from_config(config)
    found = {name.rpartition(".")[2] for name in linears(as_linears(text) if apart else text)}
    assert expected <= found and not found & {"proj", "router", "gate"}


def test_a_model_without_a_list_of_blocks() -> None:
    with pytest.raises(ModelError, match="Sequential has no list of decoder blocks"):
        decoder_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_the_longest_list_that_is_in_no_other() -> None:
    """A short list beside it, and a longer one inside a block, are none."""
    block = nn.Module()
    block.inner = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    model = nn.ModuleDict({"few": nn.ModuleList([nn.Linear(2, 2)]), "many": nn.ModuleList([block, nn.Module()])})
    assert list(decoder_blocks(model)) == ["many.0", "many.1"]
    assert list(linears(model)) == [f"many.0.inner.{index}" for index in range(5)]


def test_layers_of_codes_are_linear_layers_too() -> None:
    block = nn.Module()
    block.floats, weight = nn.Linear(16, 4), torch.randn(8, 16)
    scale, zero = fit_grid(weight.reshape(8, 1, 16), 4, False)
    codes = Quantized(torch.zeros(8, 16, dtype=torch.uint8), Grid(scale, zero, 16, 4))
    block.codes = PackedLinear(PackedWeight(codes, None, torch.float32), None)
    model = nn.ModuleDict({"h": nn.ModuleList([block])})
    assert set(all_linears(model)) == {"h.0.floats", "h.0.codes"} and set(linears(model)) == {"h.0.floats"}
    assert shape_of("x", block.codes) == LinearShape("x", 8, 16)


def skeleton(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config)
    return model


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Gemma3n"])
def test_blocks_of_the_text_model_in_a_wrapper(family: str) -> None:
    model = skeleton(FAMILIES[family]())
    blocks, text = decoder_blocks(model), text_model(model)
    assert text is not None and set(blocks.values()) <= set(text.modules())
    assert len(blocks) == model.config.get_text_config().num_hidden_layers == 2
    outside, everything = towers(model), sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    inner = {id(p): p.numel() for part in (text, head) for p in part.parameters()}
    assert sum(outside.values()) == everything - sum(inner.values()) > 0
    assert all(not name.startswith(tower) for name in linears(model) for tower in outside)


def test_what_is_outside_the_text_model() -> None:
    assert towers(skeleton(FAMILIES["Gemma3"]())) == {"model.vision_tower": 18400, "model.multi_modal_projector": 528}
    assert towers(make(LlamaConfig(vocab_size=99, num_hidden_layers=2, **SIZES))) == {}


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_towers_deeper_than_the_text_model_are_no_decoder(layers: int) -> None:
    model = skeleton(gemma4(layers))
    assert len(model.model.vision_tower.encoder.layers) == 3
    assert list(decoder_blocks(model)) == [f"model.language_model.layers.{index}" for index in range(layers)]
