"""Names in checkpoints, held against the names that transformers itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_configs import GPT2, GRANITE_MOE, HEADS, LLAMA, MIXTRAL, SIZES
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig

from sqft.checkpoints.safetensors import safetensors_header
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.architecture.names import CheckpointNames

FAMILIES = {
    "llama": LLAMA,
    "gpt2": GPT2,
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
    names = CheckpointNames(skeleton(GRANITE_MOE))
    with pytest.raises(LookupError, match=r"holds it in model.layers.0.block_sparse_moe.input_linear.weight, with oth"):
        names.checkpoint_name("model.layers.0.block_sparse_moe.experts.1.gate_proj")
    assert names.checkpoint_name("model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
