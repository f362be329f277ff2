"""mlx_lm opens what the exporter `mlx` writes: the same weights, bit for bit, and the model's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqft_mlx import Mlx
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from sqft.modeling.loading.finished_model import FinishedModel
from tests.support.byte_bpe import byte_level_bpe
from tests.support.elsewhere import ROOT, elsewhere
from tests.support.models_for_others import quantized_folder, save_random, write_expectations

pytestmark = pytest.mark.slow
CHECK = ROOT / "tests" / "consumers" / "mlx" / "check.py"
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 777.0, "factor": 2.0}
ASYMMETRIC = {"symmetric": False, "group_size": 32}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any], dict[str, Any]]] = {
    "llama 3.1, tied": (LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, {"group_size": 32}),
    "llama, biases, linear": (
        LlamaConfig,
        {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True},
        ASYMMETRIC,
    ),
    "mistral, wide heads": (MistralConfig, {"head_dim": 32, "sliding_window": None}, {"bits": 3, "group_size": -1}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}, {**ASYMMETRIC, "bits": 8}),
    "qwen3, half precision": (Qwen3Config, {"head_dim": 32}, {"group_size": 32}),
}
TEXT = "The quick brown fox jumps over 15 lazy dogs. A box has 15 stamps; Ben takes 12. Left:"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family: str, tmp_path: Path) -> None:
    """Names, positions and grids, on random weights large enough that positions matter."""
    kind, settings, grid = FAMILIES[family]
    inner = byte_level_bpe([TEXT] * 3, 320, ["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    config = kind(vocab_size=len(tokenizer), initializer_range=0.2, **SIZES | settings)
    raw: dict[str, Any] = {
        "name": "mlx",
        "model": {"path": str(save_random(config, tokenizer, tmp_path / "model"))},
        "sparsify": {"scorer": "magnitude"},
        "quantize": {"quantizer": {"name": "rtn", "options": grid}},
    }
    made, folder = quantized_folder(raw, tmp_path / "store"), tmp_path / "exported"
    folder.mkdir()
    half = "half" in family
    Mlx(dtype="float16" if half else "as-is").export(FinishedModel(made), folder)
    # In half precision, MLX rounds the activations, too.
    texts = [tokenizer(TEXT[:end]).input_ids for end in (20, 85)]
    report = elsewhere("mlx", CHECK, folder, *write_expectations(made, tmp_path, texts, 0.05 if half else 1e-4, 8))
    print(family, report)
    assert "14 quantized layers, 0 differ; 0 zeros are lost" in report
    assert half or "2 of 2 answers are equal" in report
