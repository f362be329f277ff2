"""Tiny multimodal models with random weights, and inputs with an image or sound for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

IMAGE, START, END, VIDEO = 300, 301, 302, 303
"""Tokens beyond those of the tests' tokenizer, which text never becomes."""

TEXT = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN_TOWER = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
QWEN_TOWER |= {"temporal_patch_size": 1, "out_hidden_size": 32, "num_position_embeddings": 16}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def gemma3() -> PretrainedConfig:
    """Vision with one block more than the text model."""
    return transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 16, "model_type": "gemma3_text"},
        vision_config=TOWER | {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def gemma3n() -> PretrainedConfig:
    """Sound only: its vision tower needs the package timm."""
    text = {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    text |= {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0], "num_kv_shared_layers": 0}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    audio = {"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 2, "input_feat_size": 8}
    audio |= {"sscp_conv_channel_size": (4, 4), "vocab_size": 4, "vocab_offset": 300}
    return transformers.Gemma3nConfig(
        text_config=TEXT | text,
        audio_config=audio,
        audio_soft_tokens_per_image=2,
        image_token_id=VIDEO,
        audio_token_id=IMAGE,
    )


def gemma4(layers: int = 2, **more: Any) -> PretrainedConfig:
    """Vision with more blocks than the text model has."""
    text = {"layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"], "num_hidden_layers": layers}
    text |= {"hidden_size_per_layer_input": 0, "sliding_window": 16, "global_head_dim": 8} | more
    tower = TOWER | {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16}
    return transformers.Gemma4Config(
        text_config=TEXT | text,
        vision_config=tower | {"pooling_kernel_size": 2, "default_output_length": 4},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=None,
    )


def qwen3_5() -> PretrainedConfig:
    text = TEXT | LINEAR_ATTENTION | SECTIONS
    return transformers.Qwen3_5Config(text_config=text, vision_config=QWEN_TOWER, **QWEN_TOKENS)


def qwen3_5_moe() -> PretrainedConfig:
    text = TEXT | LINEAR_ATTENTION | SECTIONS | MIXTURE | {"shared_expert_intermediate_size": 32}
    return transformers.Qwen3_5MoeConfig(text_config=text, vision_config=QWEN_TOWER, **QWEN_TOKENS)


def qwen3_vl() -> PretrainedConfig:
    tower = QWEN_TOWER | {"deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(text_config=TEXT | SECTIONS, vision_config=tower, **QWEN_TOKENS)


def llama4() -> PretrainedConfig:
    text = {"intermediate_size_mlp": 64, "num_local_experts": 4, "moe_layers": [1], "attention_chunk_size": 64}
    tower = TOWER | {"image_size": 8, "patch_size": 2, "vision_output_dim": 16, "projector_input_dim": 16}
    return transformers.Llama4Config(
        text_config=TEXT | text,
        vision_config=tower | {"intermediate_size": 64, "projector_output_dim": 16},
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def mistral3() -> PretrainedConfig:
    return transformers.Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=TOWER | {"image_size": 16, "patch_size": 4, "head_dim": 8, "model_type": "pixtral"},
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "Gemma3": gemma3,
    "Gemma3n": gemma3n,
    "Gemma4": gemma4,
    "Qwen3_5": qwen3_5,
    "Qwen3_5Moe": qwen3_5_moe,
    "Qwen3VL": qwen3_vl,
    "Llama4": llama4,
    "Mistral3": mistral3,
}


def make(family: str) -> PreTrainedModel:
    """Return a tiny random model of a family, in the stock multimodal class, without a weight of zero."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    model: PreTrainedModel = kind(FAMILIES[family]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(std=0.05)
    return model


def with_image(family: str) -> dict[str, Tensor]:
    """Return the arguments of a forward on some text with an image in it."""
    random = torch.Generator().manual_seed(0)
    places = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]])
    inputs = {"input_ids": torch.tensor([[5, START, *[IMAGE] * 4, END, 7]])}
    if family.startswith("Qwen"):
        inputs |= {"pixel_values": torch.randn(16, 48, generator=random), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        return inputs | {"mm_token_type_ids": places}
    if family == "Gemma4":
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
        inputs |= {"pixel_values": torch.randn(1, 16, 48, generator=random), "image_position_ids": grid}
        return inputs | {"mm_token_type_ids": places}
    size = {"Gemma3": 28, "Llama4": 8, "Mistral3": 16}[family]
    inputs["pixel_values"] = torch.randn(1, 3, size, size, generator=random)
    if family == "Gemma3":
        inputs["token_type_ids"] = places
    if family == "Mistral3":
        inputs["image_sizes"] = torch.tensor([[size, size]])
    return inputs
