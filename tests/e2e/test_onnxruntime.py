"""ONNX Runtime GenAI's model builder takes the GPTQ folder as it is: the same codes, and the model's own answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.model_spec import ModelSpec
from sqft.data.records import read_records
from sqft.kernels.grids import dequantize
from sqft.modeling.loading import load_model
from sqft.modeling.loading.quantized import read_quantized
from tests.support.elsewhere import ROOT, elsewhere
from tests.support.real_model import PROBLEMS, real_int4

pytestmark = pytest.mark.slow
CHECK = ROOT / "tests" / "consumers" / "onnxruntime_genai" / "check.py"
SIZES = {
    "vocab_size": 259, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
FLOATS = ("nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather", "accuracy_level=1")
"""Embedding and head stay floats, and what enters a layer is not rounded to 8 bits."""


def checked(folder: Path, scratch: Path, texts: list[list[int]], tolerance: float, new: int, *options: str) -> str:
    """What the check prints for the model in a folder, asked with these tokens."""
    layers = {name: dequantize(quantized).float() for name, quantized in read_quantized(folder).items()}
    save_file(layers, scratch / "values.safetensors")
    model, _ = load_model(ModelSpec(folder))
    prompts, answers = [], []
    for tokens in texts:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            top = model(ids).logits[0, -1].float().log_softmax(-1).topk(8)
        likely = {str(int(token)): float(value) for value, token in zip(*top, strict=True)}
        prompts.append({"tokens": tokens, "logprobs": likely})
        if new:
            said = model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
            answers.append(said[0, len(tokens) :].tolist())
    given = scratch / "given.json"
    given.write_text(json.dumps({"prompts": prompts, "answers": answers, "tolerance": tolerance}))
    values = scratch / "values.safetensors"
    return elsewhere("onnxruntime_genai", CHECK, folder, scratch / "built", values, given, *options, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    ("config", "quantizer"),
    [
        (LlamaConfig(**SIZES, tie_word_embeddings=True), {"symmetric": True, "group_size": 32}),
        (LlamaConfig(**SIZES), {"symmetric": False, "group_size": 64}),
        (Qwen2Config(**SIZES), {"symmetric": False, "group_size": 32}),
        (Qwen3Config(**SIZES, head_dim=32), {"symmetric": True, "group_size": 64}),
        (LlamaConfig(**SIZES), {"bits": 8, "group_size": 32}),
    ],
    ids=["llama, symmetric", "llama", "qwen2", "qwen3", "8 bits"],
)
def test_tiny_models(config: PretrainedConfig, quantizer: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """Every code kept, and with floats for activations the model's own logits, on random weights of some size."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    raw = {
        "name": "onnx",
        "model": {"path": str(tmp_path / "model")},
        "sparsify": {"scorer": "magnitude"},
        "quantize": {"quantizer": {"name": "rtn", "options": quantizer}},
    }
    orchestrator = Orchestrator(Registry.discover(), tmp_path / "store")
    folder = orchestrator.run(orchestrator.plan(Recipe.parse(raw)))["quantize"].folder / "model"
    print(report := checked(folder, tmp_path, [[5, 77, 13, 40, 99, 12, 200, 7]], 0.002, 6, *FLOATS))
    assert "14 of the quantized layers found" in report and " 0 differ" in report


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("options", "tolerance", "equal"), [(FLOATS, 0.01, 49), (FLOATS[:1], 1, 35)], ids=["floats", "8 bits"]
)
def test_the_real_model(options: tuple[str, ...], tolerance: float, equal: int, tmp_path: Path) -> None:
    """With activations in floats the answers are ours; the builder's own choice, 8 bits, changes some."""
    _, tokenizer = load_model(ModelSpec(real_int4()))
    texts = [tokenizer(record["prompt"]).input_ids for record in read_records(PROBLEMS, 50)]
    print(report := checked(real_int4(), tmp_path, texts, tolerance, 4, *options))
    assert "210 of the quantized layers found" in report and " 0 differ" in report
    assert int(report.split(" of 50 answers")[0].rpartition(" ")[2]) >= equal
