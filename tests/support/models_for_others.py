"""Models that other programs are to open: the real one at INT4, made once in ./store, and random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.model_spec import ModelSpec
from sqft.kernels.grids import dequantize
from sqft.modeling.loading import load_model
from sqft.modeling.loading.quantized import read_quantized
from tests.support.elsewhere import ROOT

PROBLEMS = ROOT / "examples" / "quickstart" / "data" / "test.jsonl"


def real_int4() -> Path:
    """SmolLM2 with 30 % zeros, 4 bits in symmetric groups of 64: the folder of a GPTQ checkpoint."""
    raw: dict[str, Any] = {
        "name": "gguf",
        "model": {"path": str(ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf")},
        "sparsify": {"scorer": "magnitude", "sparsity": 0.3},
        "quantize": {"quantizer": {"name": "rtn", "options": {"group_size": 64}}},
    }
    return quantized_folder(raw, ROOT / "store")


def quantized_folder(raw: dict[str, Any], store: Path) -> Path:
    """Run a recipe up to its quantized model and return that model's folder."""
    orchestrator = Orchestrator(Registry.discover(), store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))["quantize"].folder / "model"


def save_random(config: PretrainedConfig, tokenizer: Any, folder: Path) -> Path:
    """Write a model of random weights, always the same, with its tokenizer, and return its folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_expectations(
    folder: Path, scratch: Path, texts: list[list[int]], tolerance: float, new: int
) -> tuple[Path, Path]:
    """Write what another program is held against: each quantized layer as floats, and after each text (token ids) the
    most likely next tokens and `new` greedy ones. Return the two files."""
    values, given = scratch / "values.safetensors", scratch / "given.json"
    save_file({name: dequantize(layer).float() for name, layer in read_quantized(folder).items()}, values)
    model, _ = load_model(ModelSpec(folder))
    prompts, answers = [], []
    for tokens in texts:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            top = model(ids).logits[0, -1].float().log_softmax(-1).topk(8)
        likely = {str(int(token)): float(value) for value, token in zip(*top, strict=True)}
        prompts.append({"tokens": tokens, "logprobs": likely})
        said = model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
        answers.append(said[0, len(tokens) :].tolist())
    given.write_text(json.dumps({"prompts": prompts, "answers": answers, "tolerance": tolerance}))
    return values, given
