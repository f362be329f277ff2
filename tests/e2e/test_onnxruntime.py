"""ONNX Runtime GenAI's model builder takes the GPTQ folder as it is: the same codes, and the model's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from sqft.checkpoints.model_spec import ModelSpec
from sqft.data.records import read_records
from sqft.modeling.loading import load_model
from tests.support.elsewhere import ROOT, elsewhere
from tests.support.models_for_others import PROBLEMS, quantized_folder, real_int4, save_random, write_expectations

pytestmark = pytest.mark.slow
CHECK = ROOT / "tests" / "consumers" / "onnxruntime_genai" / "check.py"
SIZES = {
    "vocab_size": 259, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
FLOATS = ("nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather", "accuracy_level=1")
"""Embedding and head stay floats, and what enters a layer is not rounded to 8 bits."""


def checked(folder: Path, scratch: Path, texts: list[list[int]], tolerance: float, new: int) -> str:
    """What the check prints for the model in a folder, asked with these tokens."""
    values, given = write_expectations(folder, scratch, texts, tolerance, new)
    return elsewhere("onnxruntime_genai", CHECK, folder, scratch / "built", values, given, *FLOATS, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    ("config", "quantizer"),
    [
        (LlamaConfig(**SIZES, tie_word_embeddings=True), {"symmetric": True, "group_size": 32}),
        (Qwen2Config(**SIZES), {"symmetric": False, "group_size": 32}),
        (Qwen3Config(**SIZES, head_dim=32), {"symmetric": True, "group_size": 64}),
        (LlamaConfig(**SIZES), {"bits": 8, "group_size": 32}),
    ],
    ids=["llama", "qwen2", "qwen3", "8 bits"],
)
def test_tiny_models(config: PretrainedConfig, quantizer: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """Every code kept, and with floats for activations the model's own logits, on random weights of some size."""
    raw = {
        "name": "onnx",
        "model": {"path": str(save_random(config, tokenizer, tmp_path / "model"))},
        "sparsify": {"scorer": "magnitude"},
        "quantize": {"quantizer": {"name": "rtn", "options": quantizer}},
    }
    folder = quantized_folder(raw, tmp_path / "store")
    print(report := checked(folder, tmp_path, [[5, 77, 13, 40, 99, 12, 200, 7]], 0.002, 6))
    assert "14 of the quantized layers found" in report and " 0 differ" in report


@pytest.mark.timeout(1800)
def test_the_real_model(tmp_path: Path) -> None:
    """Answers to fifty of the quickstart's problems."""
    _, tokenizer = load_model(ModelSpec(real_int4()))
    texts = [tokenizer(record["prompt"]).input_ids for record in read_records(PROBLEMS, 50)]
    print(report := checked(real_int4(), tmp_path, texts, 0.01, 4))
    assert "210 of the quantized layers found" in report and " 0 differ" in report
    assert int(report.split(" of 50 answers")[0].rpartition(" ")[2]) >= 49
