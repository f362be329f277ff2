"""Headers of checkpoints in the modules of their models: names and shapes, held against transformers' own loading."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import multimodal_models
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GraniteMoeConfig, LlamaConfig, PreTrainedModel

from sqft.checkpoints.layout import LeftOut
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.safetensors import safetensors_header
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.compat import reverted
from sqft.modeling.loading.headers import Headers, load_headers

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 3}
EXPERT = "model.layers.0.block_sparse_moe.experts.1"
Shapes = dict[str, tuple[int, ...]]


def renamed(family: str) -> PreTrainedModel:
    """Families whose tensors have other names in checkpoints than in modules."""
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    scan = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    more: dict[str, dict[str, Any]] = {
        "Mixtral": MIXTURE,
        "NemotronH": {"layers_block_type": ["mamba", "moe", "attention"], "num_hidden_layers": 3, **scan}
        | {
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        "KimiLinear": {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "linear_num_heads": 4,
            **latent,
        }
        | {"linear_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        "Lfm3": {"num_key_value_heads": 2},
    }
    kind = getattr(transformers, f"{family}Config")
    model: PreTrainedModel = AutoModelForCausalLM.from_config(kind(**SIZES | {"pad_token_id": 0} | more[family]))
    return model


RENAMED = ("Mixtral", "NemotronH", "KimiLinear", "Lfm3")
MULTIMODAL = tuple(name for name in multimodal_models.FAMILIES if name != "Gemma3n")  # its towers need timm


def written(family: str, folder: Path) -> Shapes:
    """The shapes in the folder that transformers writes of a random model."""
    make = renamed if family in RENAMED else multimodal_models.make
    make(family).save_pretrained(folder)
    return {name: shape for file in folder.glob("*.safetensors") for name, shape in safetensors_header(file).items()}


def loaded(folder: Path, shapes: Shapes, codes: bool = False) -> Headers:
    return load_headers(ModelSpec(folder), shapes, codes)


@pytest.mark.parametrize("family", RENAMED + MULTIMODAL)
def test_a_checkpoint_that_transformers_wrote_fits(family: str, tmp_path: Path) -> None:
    shapes = written(family, tmp_path)
    found = loaded(tmp_path, shapes)
    assert not found.problems and not found.dropped
    layers = linears(found.model).keys() - found.names.unnamed.keys()
    assert layers and all(f"{found.names.checkpoint_name(layer)}.weight" in shapes for layer in layers)


def test_the_modules_know_the_names_of_their_checkpoint(tmp_path: Path) -> None:
    """Older Gemma 3 folders put the text model elsewhere; what is written of it goes back there."""
    shapes = {
        name.replace("model.language_model.", "language_model.model."): shape
        for name, shape in written("Gemma3", tmp_path).items()
    }
    found = loaded(tmp_path, shapes)
    assert not found.problems and not found.dropped
    layer = "model.language_model.layers.1.self_attn.q_proj"
    assert found.names.checkpoint_name(layer) == "language_model.model.layers.1.self_attn.q_proj"
    assert set(reverted(found.model, found.model.state_dict())) >= shapes.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "lacks model.norm.weight, which MixtralForCausalLM has by config.json"),
        (
            {"lm_head.weight": (64, 31)},
            "lm_head.weight is [64, 31], and config.json makes it [64, 32]; copy it again",
        ),
        ({f"{EXPERT}.w1.weight": (47, 32)}, f"{EXPERT}.w1.weight is [47, 32], and config.json makes it [48, 32]"),
        ({f"{EXPERT}.w3.weight": None}, f"lacks {EXPERT}.w3.weight, which MixtralForCausalLM has by config.json"),
    ],
)
def test_what_is_missing_or_mis_shaped_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in (written("Mixtral", tmp_path) | change).items() if shape}
    (problem,) = loaded(tmp_path, shapes).problems
    assert problem.startswith(message)


def test_many_missing_tensors_are_one_problem(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in written("Lfm3", tmp_path).items() if ".layers.1." not in name}
    (problem,) = loaded(tmp_path, shapes).problems
    assert problem.startswith("lacks model.layers.1.") and " more, which Lfm3ForCausalLM has" in problem


def test_tensors_that_the_class_does_not_use_are_no_problem(tmp_path: Path) -> None:
    more = {"mtp.layers.0.one.weight": (3, 3), "mtp.layers.0.two.weight": (4,)}
    found = loaded(tmp_path, written("Lfm3", tmp_path) | more)
    assert not found.problems
    assert found.dropped == (LeftOut("mtp", 13, "as Lfm3ForCausalLM has no place for it"),)


def llama(folder: Path) -> Shapes:
    """The shapes of a small Llama, whose folder holds no tensors: its headers are enough."""
    config = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    return {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}


def test_tensors_inside_blocks_that_the_class_does_not_use_are_named(tmp_path: Path) -> None:
    block = "model.layers.0"
    more = {f"{block}.extra.one.weight": (3, 3), f"{block}.extra.bias": (4,), f"{block}.self_attn.q_proj.bias": (32,)}
    found = loaded(tmp_path, llama(tmp_path) | more | {f"{block}.self_attn.sinks": (4,), "lm_head.bias": (64,)})
    assert not found.problems
    assert {part.name: part.weights for part in found.dropped} == {
        f"{block}.extra": 13,
        f"{block}.self_attn.q_proj.bias": 32,
        f"{block}.self_attn.sinks": 4,
        "lm_head.bias": 64,
    }


@pytest.mark.parametrize(
    ("name", "shape"),
    [("rotary_emb.inv_freq", (4,)), ("masked_bias", ()), ("bias", (1, 1, 8, 8)), ("q_proj.bias", (32,))],
)
def test_what_old_programs_stored_and_biases_of_zero_are_passed_over(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    name = f"model.layers.1.self_attn.{name}"
    save_file({name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    found = loaded(tmp_path, llama(tmp_path) | {name: shape})
    assert not found.problems and not found.dropped


def test_masks_that_the_class_is_known_to_leave_out_are_passed_over(tmp_path: Path) -> None:
    """Also where a checkpoint leaves out the prefix of its names, as those of the first GPT-2 do."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64)
    config.save_pretrained(tmp_path)
    shapes = {
        name.removeprefix("transformer."): tuple(p.shape)
        for name, p in AutoModelForCausalLM.from_config(config).named_parameters()
    }
    found = loaded(tmp_path, shapes | {"h.0.attn.bias": (1, 1, 8, 8), "h.0.attn.more": (2,), "h.1.more": (3,)})
    assert not found.problems
    dropped = {part.name: part.weights for part in found.dropped}
    assert dropped == {"transformer.h.0.attn.more": 2, "transformer.h.1": 3}


@pytest.mark.parametrize("architectures", [None, ["Unknown"], ["Llama4ForCausalLM"]])
def test_how_to_keep_a_tower_is_said_where_the_folder_names_no_class(
    architectures: list[str] | None, tmp_path: Path
) -> None:
    shapes = written("Llama4", tmp_path) | {"mtp.weight": (2,)}
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"architectures": architectures}))
    reasons = {part.name: part.reason for part in loaded(tmp_path, shapes).dropped}
    advice = 'config.json names no class that sqft knows: add "architectures": ["Llama4ForConditionalGeneration"]'
    assert (advice in reasons["vision_model"]) == (architectures != ["Llama4ForCausalLM"])
    assert reasons["mtp"] == "as Llama4ForCausalLM has no place for it"


def test_a_tower_that_a_class_of_text_drops_is_named(tmp_path: Path) -> None:
    shapes = written("Qwen3_5", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path).text_config
    config.architectures = ["Qwen3_5ForCausalLM"]
    config.save_pretrained(tmp_path)
    found = loaded(tmp_path, shapes)
    assert not found.problems
    (tower,) = found.dropped
    weights = sum(math.prod(shape) for name, shape in shapes.items() if ".visual." in name)
    assert (tower.name, tower.weights) == ("model.visual", weights)


@pytest.mark.parametrize("codes", [False, True])
def test_codes_are_the_other_way_round_in_a_transposed_family(codes: bool, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64))
    model.save_pretrained(tmp_path)
    name = "transformer.h.0.attn.c_attn.weight"
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    shapes[name] = (96, 32)
    assert bool(loaded(tmp_path, shapes, codes).problems) != codes


def test_codes_of_experts_that_floats_join(tmp_path: Path) -> None:
    """Granite's checkpoints hold all experts in one tensor, and codes one by one."""
    config = GraniteMoeConfig(**SIZES, **MIXTURE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    names = loaded(tmp_path, {}).names
    apart = as_linears(AutoModelForCausalLM.from_config(config)).state_dict()
    shapes = {
        name.replace("router.weight", "router.layer.weight"): tuple(tensor.shape) for name, tensor in apart.items()
    }
    expert = "model.layers.1.block_sparse_moe.experts.2.up_proj"
    assert expert in names.unnamed and names.name_of_codes(expert) == expert and f"{expert}.weight" in shapes
    found = loaded(tmp_path, shapes, codes=True)
    assert not found.problems and not found.dropped
    del shapes[f"{expert}.weight"]
    (problem,) = loaded(tmp_path, shapes, codes=True).problems
    assert problem.startswith(f"lacks {expert}.weight, which GraniteMoeForCausalLM has")
