"""Families of causal language models, tiny: what `tests/e2e/test_architectures.py` takes from end to end.

`docs/generate.py` writes the tables of docs/how-to/models.md and docs/results/families.md from this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


@dataclass(frozen=True)
class Family:
    """A family's name, the configuration of a tiny model of it, and what sqft does with it.

    Args:
        title: the name that people know.
        kind: the name of transformers' configuration without "Config".
        sizes: fields of the configuration.
        before: what sqft 0.1.0 did with it: "passes", or what was refused or left out; "" where it was not tried.
        walk: how calibration runs it.
        experts: whether it has experts, which sqft takes one by one.
        narrow: last names of layers that are left out of pruning and quantization unless they are named.
        unseen: patterns of layers that calibration does not see, or that blocks share: a recipe has to exclude them.
        floats: patterns of layers that a recipe has to leave out of `quantize`.
        apart: whether codes of its experts are stored one by one, where its own checkpoints join them.
        targets: what is adapted.
    """

    title: str
    kind: str
    sizes: dict[str, Any]
    before: str = "passes"
    walk: str = "blocks"
    experts: bool = False
    narrow: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    apart: bool = False
    targets: tuple[str, ...] = ("*",)

    def architecture(self) -> str:
        """Return the name of the class that transformers has for it."""
        return class_of(getattr(transformers, f"{self.kind}Config"))

    def notes(self) -> Iterator[str]:
        """Say what a user should know besides."""
        if self.walk == "model":
            yield "calibration runs the whole model for each block"
        if self.experts:
            yield "experts one by one" + (", their codes under names of their own" if self.apart else "")
        if self.narrow:
            yield f"left out unless named: {_code(self.narrow)}"
        if self.unseen:
            yield f"exclude {_code(self.unseen)} from `sparsify` and `quantize`"
        if self.floats:
            yield f"exclude {_code(self.floats)} from `quantize`"

    def is_dense(self, layer: str) -> bool:
        """Return whether a layer is neither pruned nor quantized."""
        return layer.rpartition(".")[2] in self.narrow or any(fnmatch(layer, pattern) for pattern in self.unseen)


def class_of(config: Any) -> str:
    """Return the name of the class that transformers has for a configuration's text model and its head."""
    kind = config.model_type
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    return str(found)


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


BASE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = BASE | {"num_key_value_heads": 2}
HEADS = SIZES | {"head_dim": 8}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
TOP_2 = {"num_experts_per_tok": 2}
EXPERTS = TOP_2 | {"num_experts": 4, "moe_intermediate_size": 32}
LOCAL_EXPERTS = TOP_2 | {"num_local_experts": 4}
ROUTED_EXPERTS = TOP_2 | {
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
SHARED_EXPERT = {"shared_expert_intermediate_size": 32}
STATE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
ONE_HEAD = {"linear_num_value_heads": 1, "linear_num_key_heads": 1, "linear_value_head_dim": 32}
LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GEMMA_4 = HEADS | SLIDING | {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
SHARING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 258,
}

NEMOTRON_H = (
    SIZES
    | {"head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8}
    | {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32}
)

NAMES = "refused: names"
WALK = "refused: walk"
DENSE_EXPERTS = "passes, experts stay dense"

FAMILIES: dict[str, Family] = {
    "Llama": Family("Llama, with biases", "Llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "Mistral": Family("Mistral", "Mistral", SIZES | {"sliding_window": 16}),
    "Ministral3": Family("Ministral 3", "Ministral3", HEADS),
    "Mistral4": Family(
        "Mistral 4, text",
        "Mistral4",
        SIZES | {"num_key_value_heads": 4, "q_lora_rank": 32} | LATENT | ROUTED_EXPERTS,
        "refused: no class",
        experts=True,
        apart=True,
    ),
    "Qwen2": Family("Qwen 2 and 2.5", "Qwen2", SIZES | {"tie_word_embeddings": True}),
    "Qwen3": Family("Qwen 3", "Qwen3", SIZES | {"head_dim": 16}),
    "Qwen3_5": Family("Qwen 3.5, text", "Qwen3_5Text", HEADS | LINEAR, narrow=("in_proj_b", "in_proj_a")),
    "Phi3": Family("Phi-3 and 4", "Phi3", SIZES | {"rms_norm_eps": 1e-5}),
    "Gemma2": Family("Gemma 2", "Gemma2", HEADS | {"sliding_window": 16}),
    "Gemma3Text": Family("Gemma 3, text", "Gemma3Text", HEADS | {"sliding_window": 16}),
    "Gemma3n": Family(
        "Gemma 3n, text",
        "Gemma3nText",
        HEADS
        | SHARING
        | {"sliding_window": 16, "laurel_rank": 32, "altup_num_inputs": 2, "intermediate_size": [64] * 4}
        | {"activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
        WALK,
        walk="model",
        unseen=("*.altup.correction_coefs",),
        floats=("*.altup.*",),
    ),
    "Gemma4": Family("Gemma 4, text", "Gemma4Text", GEMMA_4),
    "Gemma4Shared": Family(
        "Gemma 4 E2B and E4B, text: keys and values shared", "Gemma4Text", GEMMA_4 | SHARING, WALK, walk="model"
    ),
    "Gemma4Moe": Family(
        "Gemma 4 MoE, text",
        "Gemma4Text",
        GEMMA_4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        apart=True,
        experts=True,
    ),
    "SmolLM3": Family("SmolLM3", "SmolLM3", SIZES | {"no_rope_layers": [1, 0]}),
    "Olmo2": Family("OLMo 2", "Olmo2", SIZES),
    "Olmo3": Family("OLMo 3", "Olmo3", SIZES | SLIDING),
    "Granite": Family("Granite", "Granite", SIZES),
    "Glm4": Family("GLM-4", "Glm4", HEADS),
    "SeedOss": Family("Seed-OSS", "SeedOss", HEADS),
    "Exaone4": Family("EXAONE 4", "Exaone4", SIZES | SLIDING),
    "Ernie4_5": Family("ERNIE 4.5", "Ernie4_5", HEADS),
    "HunYuanDenseV1": Family("Hunyuan dense", "HunYuanDenseV1", HEADS),
    "Apertus": Family("Apertus", "Apertus", SIZES),
    "BitNet": Family("BitNet", "BitNet", SIZES),
    "Cohere2": Family("Cohere 2 (Command R7B, A)", "Cohere2", SIZES | SLIDING),
    "Starcoder2": Family("StarCoder 2", "Starcoder2", SIZES),
    "OPT": Family("OPT", "OPT", BASE | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "GPT2": Family("GPT-2", "GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "GPTNeoX": Family("GPT-NeoX, Pythia", "GPTNeoX", BASE),
    "Falcon": Family(
        "Falcon", "Falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
    ),
    "Mixtral": Family("Mixtral", "Mixtral", SIZES | LOCAL_EXPERTS, experts=True),
    "Qwen2Moe": Family("Qwen 2 MoE", "Qwen2Moe", SIZES | EXPERTS | SHARED_EXPERT, experts=True),
    "Qwen3Moe": Family("Qwen 3 MoE", "Qwen3Moe", HEADS | EXPERTS, experts=True),
    "Qwen3Next": Family(
        "Qwen3-Next",
        "Qwen3Next",
        HEADS | LINEAR | ONE_HEAD | EXPERTS | SHARED_EXPERT,
        experts=True,
        narrow=("in_proj_ba",),
    ),
    "Qwen3_5Moe": Family(
        "Qwen 3.5 MoE, text",
        "Qwen3_5MoeText",
        HEADS | LINEAR | EXPERTS | SHARED_EXPERT,
        narrow=("in_proj_b", "in_proj_a"),
        experts=True,
    ),
    "Olmoe": Family("OLMoE", "Olmoe", SIZES | TOP_2 | {"num_experts": 4}, experts=True),
    "GraniteMoe": Family("Granite MoE", "GraniteMoe", SIZES | LOCAL_EXPERTS, apart=True, experts=True),
    "Glm4Moe": Family("GLM-4 MoE (4.5 to 4.7)", "Glm4Moe", HEADS | ROUTED_EXPERTS, experts=True),
    "DeepseekV3": Family(
        "DeepSeek-V3, R1",
        "DeepseekV3",
        SIZES | {"num_key_value_heads": 4, "q_lora_rank": 32} | LATENT | ROUTED_EXPERTS,
        experts=True,
    ),
    "Phimoe": Family("PhiMoE", "Phimoe", SIZES | LOCAL_EXPERTS, experts=True),
    "MiniMaxM2": Family("MiniMax-M2", "MiniMaxM2", HEADS | LOCAL_EXPERTS, experts=True),
    "GptOss": Family(
        "gpt-oss",
        "GptOss",
        HEADS | LOCAL_EXPERTS | {"sliding_window": 16},
        DENSE_EXPERTS,
        apart=True,
        experts=True,
    ),
    "Llama4Text": Family(
        "Llama 4, text",
        "Llama4Text",
        HEADS
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
        },
        DENSE_EXPERTS,
        apart=True,
        experts=True,
    ),
    "Lfm2": Family("LFM2", "Lfm2", SIZES | {"layer_types": ["conv", "full_attention"]}),
    "Lfm2Moe": Family(
        "LFM2 MoE",
        "Lfm2Moe",
        SIZES | EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        experts=True,
    ),
    "Lfm3": Family(
        "LFM3",
        "Lfm3",
        HEADS
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        | {"layer_types": ["conv", "full_attention"]},
        NAMES,
        narrow=("g_proj",),
    ),
    "RecurrentGemma": Family(
        "RecurrentGemma",
        "RecurrentGemma",
        BASE | {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    ),
    "OlmoHybrid": Family("OLMo hybrid", "OlmoHybrid", SIZES | LINEAR, narrow=("a_proj", "b_proj")),
    "GraniteHybrid": Family(
        "Granite 4 hybrid",
        "GraniteMoeHybrid",
        SIZES | SCAN | {"num_local_experts": 0, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
    ),
    "GraniteHybridMoe": Family(
        "Granite 4 hybrid MoE",
        "GraniteMoeHybrid",
        SIZES | SCAN | LOCAL_EXPERTS | {"shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]},
        apart=True,
        experts=True,
    ),
    "FalconH1": Family("Falcon-H1", "FalconH1", HEADS | SCAN | {"mamba_d_ssm": 64}),
    "NemotronH": Family("Nemotron-H, Nemotron 3", "NemotronH", NEMOTRON_H, NAMES, experts=True),
    "NemotronHLatent": Family(
        "Nemotron 3 with latent experts",
        "NemotronH",
        NEMOTRON_H | {"moe_latent_size": 64},
        "",
        experts=True,
    ),
    "KimiLinear": Family(
        "Kimi Linear",
        "KimiLinear",
        SIZES
        | LATENT
        | LOCAL_EXPERTS
        | {"num_key_value_heads": 4, "moe_intermediate_size": 32, "linear_head_dim": 32, "linear_num_heads": 2}
        | {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
        NAMES,
        narrow=("b_proj",),
        experts=True,
    ),
    "Mamba": Family("Mamba", "Mamba", STATE | {"time_step_rank": 16}, unseen=("*.dt_proj",)),
    "Mamba2": Family("Mamba 2", "Mamba2", STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "Jamba": Family(
        "Jamba",
        "Jamba",
        SIZES
        | {
            "num_experts": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 16,
        }
        | {"attn_layer_period": 2, "attn_layer_offset": 1},
        unseen=("*.dt_proj",),
        experts=True,
    ),
    "Bamba": Family("Bamba", "Bamba", SIZES | SCAN | {"attn_layer_indices": [1]}),
    "Zamba2": Family(
        "Zamba 2",
        "Zamba2",
        BASE
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8}
        | {"mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1},
        unseen=("*.shared_transformer.*",),
        targets=("*.mamba.*", "*.linear"),
    ),
    "xLSTM": Family(
        "xLSTM",
        "xLSTM",
        STATE | {"num_heads": 2, "num_blocks": 2, "chunk_size": 8},
        narrow=("igate_preact", "fgate_preact"),
    ),
}


def save_family(family: str, tokenizer: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the tiny model of a family, with its tokenizer."""
    common = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 1}
    kind = getattr(transformers, f"{FAMILIES[family].kind}Config")
    config = kind(**common | {"pad_token_id": 1} | FAMILIES[family].sizes)
    torch.manual_seed(0)
    getattr(transformers, class_of(config))(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
