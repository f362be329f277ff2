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
        activation: the only one that llama.cpp computes.
        norm_offset: what transformers adds to the weights of norms, and llama.cpp does not.
        period: of so many layers in turn, llama.cpp gives all but the last one a sliding window; 0: none has one.
        deepest: the number of layers at which llama.cpp scales attention by the model's width, as the largest model
            does, in place of the size of a head.
        named: what a model's name must hold for llama.cpp to treat its tokens as it should.
    """

    architecture: MODEL_ARCH
    interleaved: bool = False
    activation: str = "silu"
    norm_offset: float = 0.0
    period: int = 0
    deepest: int = 0
    named: str = ""


GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Family(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "phi3": Family(MODEL_ARCH.PHI3, named="phi-3"),
    "gemma2": Family(MODEL_ARCH.GEMMA2, activation=GELU, norm_offset=1.0, period=2, deepest=46),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, activation=GELU, norm_offset=1.0, period=6, deepest=62),
}
"""By `model_type` of config.json."""
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
WRITTEN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
SCALINGS = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
OWN = {
    MODEL_ARCH.LLAMA: {"llama3": {"low_freq_factor", "high_freq_factor"}},
    MODEL_ARCH.PHI3: {"longrope": {"long_factor", "short_factor", "attention_factor"}},
}
"""Ways to scale positions that one architecture has, with their own settings."""


def refusal_of_config(config: Mapping[str, Any]) -> str | None:
    """Return why a model with this config.json cannot be written; None when it can, or nothing is known of it."""
    kind = config.get("model_type")
    if kind is None:
        return None
    if kind not in FAMILIES:
        return f"'gguf' writes models of {', '.join(FAMILIES)}, and this one's model_type is {kind}"
    family = FAMILIES[kind]
    if why := _refusal_of_positions(config, kind):
        return why
    if config.get("attention_bias") and kind in ("qwen3", "gemma2", "gemma3_text"):
        return f"llama.cpp has no biases of attention in models of {kind}"
    found = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if found != family.activation:
        return f"llama.cpp computes {family.activation} in models of {kind}, and this one has {found}"
    return _refusal_of_gemma(config, kind) if family.period else _refusal_of_window(config, kind)


def _refusal_of_positions(config: Mapping[str, Any], kind: str) -> str | None:
    rope, own = _rope(config), OWN.get(FAMILIES[kind].architecture, {})
    scaled = rope.get("rope_type", "default")
    if scaled not in ("default", *SCALINGS, *own):
        return f"'gguf' cannot write positions of {kind} that are scaled by '{scaled}'"
    known = WRITTEN | own.get(scaled, set())
    if more := sorted(name for name in rope.keys() - known if rope[name] is not None):
        return f"'gguf' cannot write {more[0]} of positions that are scaled by '{scaled}'"
    if kind != "phi3" and _rotated(config) != heads_of(config)[2]:
        return f"'gguf' cannot write partial_rotary_factor of {kind}"
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_type", "default")
    if local != "default":
        return f"'gguf' cannot write positions in a sliding window that are scaled by '{local}'"
    return None


def _refusal_of_window(config: Mapping[str, Any], kind: str) -> str | None:
    has_window = kind in ("mistral", "phi3") or config.get("use_sliding_window")
    window = config.get("sliding_window") if has_window else None
    if window and window < config.get("max_position_embeddings", window + 1):
        return (
            f"llama.cpp has no sliding window in models of {kind}; where no text is longer than {window} tokens, set "
            "sliding_window to null in config.json"
        )
    return None


def _refusal_of_gemma(config: Mapping[str, Any], kind: str) -> str | None:
    """Return what of a Gemma llama.cpp takes for granted and this model has otherwise."""
    family, layers = FAMILIES[kind], config.get("num_hidden_layers")
    kinds = config.get("layer_types") or []
    full = [index for index, name in enumerate(kinds) if name == "full_attention"]
    if full != list(range(family.period - 1, len(kinds), family.period)):
        return (
            f"llama.cpp gives every layer of {kind} but each {family.period}th a sliding window, and layer_types differ"
        )
    heads, _, size = heads_of(config)
    scale = config.get("query_pre_attn_scalar", 0)
    expected = config.get("hidden_size", 0) // heads if layers == family.deepest else size
    if scale and scale != expected:
        return f"llama.cpp scales attention of {kind} by {expected}, and query_pre_attn_scalar is {scale}"
    if config.get("use_bidirectional_attention"):
        return "llama.cpp has no attention in both directions (use_bidirectional_attention)"
    if config.get("tie_word_embeddings") is False:
        return f"llama.cpp has no head in models of {kind} besides the embedding"
    caps = config.get("attn_logit_softcapping", 1), config.get("final_logit_softcapping", 1)
    if kind == "gemma2" and not all(caps):
        return (
            "llama.cpp caps the logits of gemma2, and this one has no attn_logit_softcapping or final_logit_softcapping"
        )
    if kind == "gemma3_text" and config.get("attn_logit_softcapping"):
        return "llama.cpp does not cap the logits of attention in models of gemma3_text (attn_logit_softcapping)"
    return None


def heads_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return a model's numbers of heads of queries and of keys, and the size of a head; 1 where it is not known."""
    heads = config.get("num_attention_heads", 1)
    size = config.get("head_dim") or config.get("hidden_size", heads) // heads
    return heads, config.get("num_key_value_heads") or heads, size


def add_settings(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write what llama.cpp must know of a model besides its weights and its tokenizer."""
    heads, key_heads, size = heads_of(config)
    rope, family = _rope(config), FAMILIES[config["model_type"]]
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
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if (kind := rope.get("rope_type", "default")) in SCALINGS:
        writer.add_rope_scaling_type(SCALINGS[kind])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    original = rope.get("original_max_position_embeddings")
    if original and kind in (*SCALINGS, "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(_attention_factor(config))
    if family.period:
        writer.add_sliding_window(config["sliding_window"])
        writer.add_rope_freq_base_swa(float(_rope(config, "sliding_attention")["rope_theta"]))
    if cap := config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(cap)
    if cap := config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)


def rope_factors(config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Return what the frequency of each pair of a head's numbers is divided by, float32 [size / 2], by the names of
    GGUF's tensors: those of Llama 3.1, and for Phi-3 those of long texts and those of short ones. (Rules and names:
    `rope_type` "llama3" and "longrope" of transformers.)"""
    rope = _rope(config)
    if rope.get("rope_type") == "longrope":
        return {name: np.array(rope[key], np.float32) for name, key in ((LONG, "long_factor"), (SHORT, "short_factor"))}
    if rope.get("rope_type") != "llama3":
        return {}
    _, _, size = heads_of(config)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the window of pre-training
    share = np.clip((turns - low) / (high - low), 0, 1)  # of the frequency as it was
    return {FREQUENCIES: (1 / (share + (1 - share) / rope["factor"])).astype(np.float32)}


def interleave(rows: Any, heads: int) -> Any:
    """Put rows [heads · size, …] of queries or keys in llama.cpp's order: those of a head's two halves in turn."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _attention_factor(config: Mapping[str, Any]) -> float:
    """Return what "longrope" multiplies queries and keys by, together."""
    rope = _rope(config)
    if given := rope.get("attention_factor"):
        return float(given)
    original = rope["original_max_position_embeddings"]
    longer = rope.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0


def _rotated(config: Mapping[str, Any]) -> int:
    """Return how many of a head's numbers positions turn."""
    share = _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return int(heads_of(config)[2] * (1.0 if share is None else share))


def _rope(config: Mapping[str, Any], layers: str = "full_attention") -> dict[str, Any]:
    """Return how positions are turned into angles, of a config.json of transformers 5 or 4: in all layers, or in those
    of one kind where kinds differ."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = scaling.get(layers, scaling)
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    return {**scaling, "rope_type": kind, **({} if theta is None else {"rope_theta": theta})}
