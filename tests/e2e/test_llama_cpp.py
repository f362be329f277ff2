"""llama.cpp opens what the exporter `gguf` writes, and says what the model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sqft_gguf import Gguf
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.model_spec import ModelSpec
from sqft.data.records import read_records
from sqft.modeling.evaluation import exact_match
from sqft.modeling.loading import load_model
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.utils.progress import silent
from tests.support.byte_bpe import byte_level_bpe
from tests.support.elsewhere import ROOT, elsewhere
from tests.support.models_for_others import PROBLEMS, real_int4, save_random

pytestmark = pytest.mark.slow
CHECK = ROOT / "tests" / "consumers" / "llama_cpp" / "check.py"
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, biases, a head of its own": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama 3.1": (LlamaConfig, {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral, wide heads": (MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}
TEXT = "The quick brown fox jumps over 15 lazy dogs. A box has 15 stamps; Ben takes 12. Left:"


@pytest.fixture(scope="module")
def merged_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, which llama.cpp wants, and a token that ends a text."""
    inner = byte_level_bpe([TEXT] * 3, 320, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def said(model: PreTrainedModel, tokenizer: Any, texts: list[str], likely: int) -> list[dict[str, Any]]:
    """The most likely next tokens after each text, with their log probabilities."""
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            logprobs = model(ids).logits[0, -1].float().log_softmax(-1)
        top = logprobs.topk(likely)
        by_token = {str(int(token)): float(value) for value, token in zip(*top, strict=True)}
        found.append({"text": text, "tokens": ids[0].tolist(), "logprobs": by_token})
    return found


def asked(file: Path, scratch: Path, prompts: list[dict[str, Any]], tolerance: float, answers: Any = ()) -> str:
    given = scratch / "given.json"
    given.write_text(json.dumps({"prompts": prompts, "answers": list(answers), "tolerance": tolerance}))
    return elsewhere("llama_cpp", CHECK, file, given)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["floats", "codes"])
def test_each_family(family: str, precision: str, merged_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Names, orders of rows and positions, on random weights large enough that positions matter."""
    kind, settings = FAMILIES[family]
    config = kind(vocab_size=len(merged_tokenizer), initializer_range=0.2, **SIZES | settings)
    made_of = save_random(config, merged_tokenizer, tmp_path / "model")
    recipe: dict[str, Any] = {"name": "gguf", "model": {"path": str(made_of)}}
    recipe |= {"sparsify": {"scorer": "magnitude"}, "export": [{"exporter": "gguf"}]}
    if precision == "codes":
        recipe["quantize"] = {"quantizer": {"name": "rtn", "options": {"symmetric": False, "group_size": 32}}}
    orchestrator = Orchestrator(Registry.discover(), tmp_path / "store")
    run = orchestrator.run(orchestrator.plan(Recipe.parse(recipe)))
    made = run["quantize" if precision == "codes" else "sparsify"].folder / "model"
    model, own = load_model(ModelSpec(made))
    file = run["export"].folder / "model" / "model.gguf"
    # With codes, llama.cpp rounds what enters a layer to 8 bits.
    tolerance = 0.3 if precision == "codes" else 0.02
    print(family, precision, report := asked(file, tmp_path, said(model, own, [TEXT], 8), tolerance))
    assert "largest difference" in report


@pytest.mark.timeout(1800)
def test_the_real_model(tmp_path: Path) -> None:
    """INT4 in symmetric groups: answers to fifty of the quickstart's problems, and the next tokens' probabilities."""
    made = real_int4()
    folder = tmp_path / "exported"
    folder.mkdir()
    Gguf(embeddings="float16").export(FinishedModel(made), folder)
    model, tokenizer = load_model(ModelSpec(made))
    records = read_records(PROBLEMS, 50)
    texts = [record["prompt"] for record in records]
    found = exact_match(model, tokenizer, records, "text", 4, 8, silent)
    answers = [{"text": one["generated"], "tokens": 4} for one in found["predictions"]]
    report = asked(folder / "model.gguf", tmp_path, said(model, tokenizer, texts, 5), 0.5, answers)
    equal = int(report.split(" of 50 answers")[0].rpartition(" ")[2])
    print(report)
    assert equal >= 40
