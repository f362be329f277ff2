"""Configurations of tiny models that transformers stores in different ways."""

from __future__ import annotations

from transformers import GPT2Config, GraniteMoeConfig, LlamaConfig, MixtralConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**SIZES, **HEADS)
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
"""Its linear layers are stored as [in, out]."""
MIXTRAL = MixtralConfig(**SIZES, **HEADS, num_local_experts=3)
"""Its experts are stored one by one, under other names than its modules have."""
GRANITE_MOE = GraniteMoeConfig(**SIZES, **HEADS, num_local_experts=3)
"""Its experts are stored together, in one tensor."""
