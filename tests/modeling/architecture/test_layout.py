"""What a plan is told of a model, from its modules alone."""

from __future__ import annotations

from pathlib import Path

from transformers import Gemma4TextConfig, GraniteMoeConfig, MambaConfig, PreTrainedTokenizerFast

from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.architecture.layout import describe
from sqft.types import LinearShape


def test_layers_and_blocks_are_those_of_the_modules(model_folder: Path) -> None:
    layout = describe(ModelSpec(model_folder))
    assert layout.architecture == "LlamaForCausalLM"
    assert layout.blocks == ("model.layers.0", "model.layers.1")
    assert layout.linears[0] == LinearShape("model.layers.0.self_attn.q_proj", 32, 32)
    assert layout.linears[-1] == LinearShape("model.layers.1.mlp.down_proj", 32, 64)
    assert len(layout.linears) == 14
    assert not (layout.checkpoint_names or layout.unnamed or layout.left_out or layout.experts)


def test_a_mixture_is_described_expert_by_expert(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    GraniteMoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    ).save_pretrained(tmp_path)  # fmt: skip
    layout = describe(ModelSpec(tmp_path))
    assert layout.experts == tuple(f"model.layers.0.block_sparse_moe.experts.{i}" for i in range(3))
    experts = [layer.name for layer in layout.linears if ".experts." in layer.name]
    assert len(experts) == 9
    assert layout.unnamed.keys() == set(experts)


def test_how_calibration_runs_it_and_what_it_does_not_call(tmp_path: Path) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2}
    MambaConfig(**sizes, state_size=4).save_pretrained(tmp_path / "mamba")
    layout = describe(ModelSpec(tmp_path / "mamba"))
    assert (layout.walk, layout.walk_reason) == ("blocks", "")
    assert layout.unseen == layout.uncalled == tuple(f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1))
    sizes |= {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sharing = {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2, "global_head_dim": 8}
    Gemma4TextConfig(**sizes, **sharing, hidden_size_per_layer_input=8).save_pretrained(tmp_path / "gemma")
    layout = describe(ModelSpec(tmp_path / "gemma"))
    assert layout.walk == "model" and "blocks leave tensors for later ones" in layout.walk_reason
    assert not (layout.unseen or layout.uncalled)
