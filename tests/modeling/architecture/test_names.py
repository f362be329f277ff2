"""Names in checkpoints, held against the names that transformers itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from sqft.checkpoints.safetensors import safetensors_header
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.architecture.names import CheckpointNames

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MIXTRAL = MixtralConfig(**SIZES, **HEADS, num_local_experts=3)
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
    "mixtral": MIXTRAL,
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **HEADS, num_experts=3, moe_intermediate_size=16),
}


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return as_linears(AutoModelForCausalLM.from_config(config))


def written(config: PreTrainedConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return safetensors_header(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_the_name_that_transformers_writes(family: str, tmp_path: Path) -> None:
    """Every layer is named as in the folder, and the tensor of that name becomes a tensor of the layer's module."""
    stored = written(FAMILIES[family], tmp_path)
    model = skeleton(FAMILIES[family])
    names = CheckpointNames(model, stored)
    for layer in linears(model):
        name = names.checkpoint_name(layer)
        assert f"{name}.weight" in stored
        assert names.layer(name) == layer
        tensor = names.module_tensor(f"{name}.weight")
        assert tensor == f"{layer}.weight" or layer.startswith(f"{tensor.rpartition('.')[0]}.")
    assert not names.unnamed


def test_names_of_single_experts_are_the_familys_own() -> None:
    names = CheckpointNames(skeleton(MIXTRAL))
    assert names.checkpoint_name("model.layers.1.mlp.experts.2.up_proj") == (
        "model.layers.1.block_sparse_moe.experts.2.w3"
    )
    assert names.layer("model.layers.1.block_sparse_moe.experts.2.w2") == "model.layers.1.mlp.experts.2.down_proj"


def test_an_expert_that_the_checkpoint_joins_with_others_has_no_name() -> None:
    names = CheckpointNames(skeleton(GraniteMoeConfig(**SIZES, **HEADS, num_local_experts=3)))
    with pytest.raises(LookupError, match=r"holds it in model.layers.0.block_sparse_moe.input_linear.weight, with oth"):
        names.checkpoint_name("model.layers.0.block_sparse_moe.experts.1.gate_proj")
    assert names.checkpoint_name("model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
