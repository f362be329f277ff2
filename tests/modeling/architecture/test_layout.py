"""What a plan is told of a model: from its modules, and from its checkpoint's headers held against them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import multimodal_models
import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma4TextConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Zamba2Config,
)

from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.source import find_model
from sqft.errors import ModelError
from sqft.modeling.architecture.layout import describe
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.types import LinearShape
from sqft.utils.digests import Digests

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def described(folder: Path) -> ModelLayout:
    return describe(ModelSpec(folder), find_model(str(folder), Path, None, Digests()))


@pytest.fixture
def layout_of(tmp_path: Path, tokenizer: Any) -> Callable[[PreTrainedConfig], ModelLayout]:
    """Describes a random model of a config."""

    def layout_of(config: PreTrainedConfig) -> ModelLayout:
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return described(tmp_path)

    return layout_of


def test_layers_are_those_of_the_modules(model_folder: Path) -> None:
    layout = described(model_folder)
    assert layout.architecture == "LlamaForCausalLM"
    assert layout.linears[0] == LinearShape("model.layers.0.self_attn.q_proj", 32, 32)
    assert layout.linears[-1] == LinearShape("model.layers.1.mlp.down_proj", 32, 64)
    assert len(layout.linears) == 14
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    assert layout.sizes.items() >= sizes.items()
    head = "the head, whose weight is that of model.embed_tokens"
    outside = {"model.embed_tokens": "the embedding", "lm_head": head}
    plain = ModelLayout("LlamaForCausalLM", layout.sizes, layout.linears, outside=outside)
    assert layout == plain  # nothing is left out, unseen, renamed or wrong


def test_codes_are_described_as_their_floats(quantized_folder: Path, model_folder: Path) -> None:
    assert described(quantized_folder) == described(model_folder)


def test_a_mixture_is_described_expert_by_expert(layout_of: Callable[[PreTrainedConfig], ModelLayout]) -> None:
    layout = layout_of(GraniteMoeConfig(vocab_size=258, **SIZES, num_key_value_heads=2, num_local_experts=3))
    assert layout.experts[:3] == tuple(f"model.layers.0.block_sparse_moe.experts.{i}" for i in range(3))
    experts = [layer.name for layer in layout.linears if ".experts." in layer.name]
    assert len(experts) == 2 * 9
    assert layout.unnamed.keys() == set(experts) and not layout.problems


def test_a_weight_that_several_layers_share(layout_of: Callable[[PreTrainedConfig], ModelLayout]) -> None:
    config = Zamba2Config(
        vocab_size=258, **SIZES | {"num_hidden_layers": 4}, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8,
        mamba_headdim=8, n_mamba_heads=8, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1, num_key_value_heads=4,
        bos_token_id=1, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    shared = layout_of(config).shared
    assert shared and all(shared[other] for other in shared.values())


def test_layers_whose_weight_is_read(layout_of: Callable[[PreTrainedConfig], ModelLayout]) -> None:
    layout = layout_of(MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=8))
    expected = tuple(f"backbone.layers.{i}.mixer.dt_proj" for i in range(2))
    assert layout.unseen == expected
    assert layout.walk == "blocks"


def test_a_model_that_is_run_as_a_whole(layout_of: Callable[[PreTrainedConfig], ModelLayout]) -> None:
    sizes = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
    sharing = {"num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 2}
    layout = layout_of(Gemma4TextConfig(vocab_size=258, vocab_size_per_layer_input=258, **sizes, **sharing))
    assert layout.walk == "model" and "blocks leave tensors for later ones" in layout.walk_reason
    assert not (layout.unseen or layout.problems)


def test_keys_and_values_of_one_small_head_are_not_narrow(
    layout_of: Callable[[PreTrainedConfig], ModelLayout],
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 16}
    layout = layout_of(LlamaConfig(vocab_size=258, **sizes, num_key_value_heads=1))
    assert LinearShape("model.layers.0.self_attn.k_proj", 16, 256) in layout.linears
    assert not layout.narrow


def test_towers_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    model = multimodal_models.make("Gemma3")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    layout = described(tmp_path)
    assert layout.architecture == "Gemma3ForConditionalGeneration" and not layout.problems
    assert all(layer.name.startswith("model.language_model.layers.") for layer in layout.linears)
    outside = {part.name: part.weights for part in layout.left_out}
    assert outside["model.vision_tower"] == sum(p.numel() for p in model.model.vision_tower.parameters())
    assert layout.sizes["hidden_size"] == 32


# -- checkpoints that do not fit ------------------------------------------------------------------


def changed(folder: Path, source: Path, **config: Any) -> Path:
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_an_architecture_transformers_does_not_know(model_folder: Path, tmp_path: Path) -> None:
    folder = changed(tmp_path / "odd", model_folder, model_type="lama")
    with pytest.raises(ModelError, match=r"cannot make a causal language model of .*odd: .*lama"):
        described(folder)


def test_a_config_that_disagrees_with_the_weights(model_folder: Path, tmp_path: Path) -> None:
    (problem,) = described(changed(tmp_path / "wide", model_folder, intermediate_size=128)).problems
    assert problem.startswith("model.layers.0.mlp.down_proj.weight is [32, 64], and config.json makes it [32, 128]")


@pytest.mark.parametrize("quantized", [False, True], ids=["floats", "codes"])
def test_a_tokenizer_larger_than_the_vocabulary(
    model_folder: Path, quantized_folder: Path, tmp_path: Path, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(tmp_path / "few", quantized_folder if quantized else model_folder, vocab_size=200)
    whole = load_file(folder / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & whole.keys():
        whole[name] = whole[name][:200].clone()
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(FolderReader, "tensor", None)  # no weight is read
    (problem,) = described(folder).problems
    assert problem.startswith("the tokenizer has 257 tokens, and the model has rows for 200")
