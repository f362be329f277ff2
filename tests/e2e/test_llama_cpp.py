"""llama.cpp opens what the exporter `gguf` writes, and says what the model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sqft_gguf import Gguf
from tokenizers import AddedToken
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
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
from tests.support.sentencepiece_bpe import sentencepiece_bpe

pytestmark = pytest.mark.slow
CHECK = ROOT / "tests" / "consumers" / "llama_cpp" / "check.py"
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32}
GEMMA_SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.6, 1.9], "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
}  # fmt: skip
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, biases, a head of its own": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "llama 3.1": (LlamaConfig, {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral, wide heads": (MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "llama, SentencePiece": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "gemma2": (Gemma2Config, {**GEMMA, "sliding_window": 16}),
    "gemma3": (Gemma3TextConfig, {**GEMMA, "num_hidden_layers": 7, "sliding_window": 16}),
    "gemma3, scaled": (
        Gemma3TextConfig,
        {**GEMMA, "num_hidden_layers": 7, "sliding_window": 16, "rope_parameters": GEMMA_SCALED},
    ),
    "phi3": (Phi3Config, {}),
    # llama.cpp takes the factors of long texts where its context, here 256, is longer than the original one.
    "phi3, for long texts": (Phi3Config, {"rope_parameters": LONG, "max_position_embeddings": 1024}),
}
TEXT = "The quick brown fox jumps over 15 lazy dogs. A box has 15 stamps; Ben takes 12. Left:"
TEXTS = {"phi3": "<|user|> \n Hello the row<|endoftext|> brown", "gemma": "two  boxes\n\n   the quick ümlaut 🦊"}
"""What a family's tokenizer treats in its own way, by how its name begins."""


@pytest.fixture(scope="module")
def merged_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, which llama.cpp wants, and a token that ends a text."""
    inner = byte_level_bpe([TEXT] * 3, 320, ["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def tokenizer_of(family: str, merged_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    end = "</s>"
    if family.startswith("gemma"):
        inner = sentencepiece_bpe(True, ["\n\n", "▁▁"])
    elif family.startswith("phi3"):
        end, after = "<|endoftext|>", {"rstrip": True, "normalized": False}
        inner = sentencepiece_bpe(False, [AddedToken("</s>", **after), AddedToken("<|user|>", special=True, **after)])
    elif "SentencePiece" in family:
        inner = sentencepiece_bpe(False)
    else:
        return merged_tokenizer
    inner.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=end, unk_token="<unk>")


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


def is_text(prompt: dict[str, Any], tokenizer: Any) -> bool:
    """Whether the likeliest next tokens are text: llama.cpp says nothing of an end, nor of part of a letter."""
    best = max(prompt["logprobs"].values())
    likely = [int(token) for token, logprob in prompt["logprobs"].items() if logprob > best - 0.5]
    pieces = tokenizer.convert_ids_to_tokens(likely)
    return not any(
        piece.startswith("<") or "�" in tokenizer.decode([row]) for row, piece in zip(likely, pieces, strict=True)
    )


def asked(file: Path, scratch: Path, prompts: list[dict[str, Any]], tolerance: float, answers: Any = ()) -> str:
    given = scratch / "given.json"
    given.write_text(json.dumps({"prompts": prompts, "answers": list(answers), "tolerance": tolerance}))
    return elsewhere("llama_cpp", CHECK, file, given)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["floats", "codes"])
def test_each_family(family: str, precision: str, merged_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Names, orders of rows and positions, on random weights large enough that positions matter."""
    kind, settings = FAMILIES[family]
    tokenizer = tokenizer_of(family, merged_tokenizer)
    config = kind(vocab_size=len(tokenizer), initializer_range=0.2, **SIZES | settings)
    made_of = save_random(config, tokenizer, tmp_path / "model")
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
    texts = [TEXT[:end] for end in range(len(TEXT), 50, -2)]
    texts += [text for name, text in TEXTS.items() if family.startswith(name)]
    prompts = [one for one in said(model, own, texts, 8) if is_text(one, own)][-6:]
    assert prompts and ("gemma" not in family or max(len(one["tokens"]) for one in prompts) > 32)  # two windows
    print(family, precision, len(prompts), report := asked(file, tmp_path, prompts, tolerance))
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
