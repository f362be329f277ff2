"""Families of models that GGUF files are written of: their names in GGUF, and what llama.cpp must know of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from numpy.typing import NDArray


@dataclass(frozen=True)
class Family:
    """How GGUF has a family of models.

    Args:
        architecture: its name there.
        interleaved: whether llama.cpp turns neighbours in a head by an angle, where transformers turns the two halves:
            rows of queries and keys are then put in another order.
    """

    architecture: MODEL_ARCH
    interleaved: bool = False


FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Family(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
}
"""By `model_type` of config.json."""
ROPE_FREQUENCIES = "rope_freqs.weight"
WRITTEN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
SCALINGS = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}


def refusal_of_config(config: Mapping[str, Any]) -> str | None:
    """Return why a model with this config.json cannot be written; None when it can, or nothing is known of it."""
    kind = config.get("model_type")
    if kind is None:
        return None
    if kind not in FAMILIES:
        return f"'gguf' writes models of {', '.join(FAMILIES)}, and this one's model_type is {kind}"
    rope = _rope(config)
    scaled = rope.get("rope_type", "default")
    known = ("default", *SCALINGS, *(("llama3",) if FAMILIES[kind].architecture == MODEL_ARCH.LLAMA else ()))
    if scaled not in known:
        return f"'gguf' cannot write positions of {kind} that are scaled by '{scaled}'"
    if scaled != "llama3" and (more := sorted(name for name in rope.keys() - WRITTEN if rope[name] is not None)):
        return f"'gguf' cannot write {more[0]} of positions that are scaled by '{scaled}'"
    if config.get("attention_bias") and kind == "qwen3":
        return "llama.cpp has no biases of attention in models of qwen3"
    if config.get("hidden_act", "silu") != "silu":
        return f"llama.cpp computes silu in models of {kind}, and this one has {config['hidden_act']}"
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    if window and window < config.get("max_position_embeddings", window + 1):
        return (
            f"llama.cpp has no sliding window in models of {kind}; where no text is longer than {window} tokens, set "
            "sliding_window to null in config.json"
        )
    return None


def heads_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return a model's numbers of heads of queries and of keys, and the size of a head."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return heads, config.get("num_key_value_heads") or heads, size


def add_settings(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write what llama.cpp must know of a model besides its weights and its tokenizer."""
    heads, key_heads, size = heads_of(config)
    rope = _rope(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if (kind := rope.get("rope_type", "default")) in SCALINGS:
        writer.add_rope_scaling_type(SCALINGS[kind])
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)


def rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Return what Llama 3.1 divides the frequency of each pair of a head's numbers by, float32 [size / 2]; None for a
    model that divides none. (Rule and names: `rope_type` "llama3" of transformers.)"""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    _, _, size = heads_of(config)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the window of pre-training
    share = np.clip((turns - low) / (high - low), 0, 1)  # of the frequency as it was
    factors: NDArray[np.float32] = (1 / (share + (1 - share) / rope["factor"])).astype(np.float32)
    return factors


def interleave(rows: Any, heads: int) -> Any:
    """Put rows [heads · size, …] of queries or keys in llama.cpp's order: those of a head's two halves in turn."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how positions are turned into angles, of a config.json of transformers 5 or 4."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {**scaling, "rope_type": kind, **({} if theta is None else {"rope_theta": theta})}
