"""Tiny models, tokenizers and data, built in code: no network, no file from outside."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sqft import Registry
from sqft.api import Grid, Quantized
from sqft.kernels.grids import fit_grid, quantize_to_codes
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.loading.quantized import save_quantized

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def pytest_collection_finish() -> None:
    """Let the collector of garbage pass over what was imported, half a million objects: Trainer starts it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    built = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>")
    built.chat_template = CHATML
    return built


def make_model(vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(len(tokenizer))


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def on_grid(
    weight: torch.Tensor, bits: int = 4, size: int = 32, symmetric: bool = True, act_order: bool = False
) -> Quantized:
    """A weight [out, in] rounded to nearest, in groups of a random order where asked."""
    out, inputs = weight.shape
    groups = 1 if size == -1 else inputs // size
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)) if act_order else range(inputs)
    index = torch.empty(inputs, dtype=torch.int32)
    index[list(order)] = torch.arange(inputs, dtype=torch.int32) // (inputs // groups)
    scale, zero = fit_grid(weight.float()[:, list(order)].reshape(out, groups, -1), bits, symmetric)
    codes = quantize_to_codes(weight.float(), scale[:, index.long()], zero[:, index.long()], 2**bits - 1).to(
        torch.uint8
    )
    in_order = groups == 1 or not act_order
    return Quantized(codes, Grid(scale.half(), zero, size, bits, None if in_order else index))


@pytest.fixture(scope="session")
def quantized_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with all but down_proj on asymmetric grids in act-order, as the quantize step writes it."""
    folder = tmp_path_factory.mktemp("quantized")
    model = make_model(len(tokenizer)).to(torch.bfloat16)
    layers = {
        name: on_grid(layer.weight.detach(), size=16, symmetric=False, act_order=True)
        for name, layer in linears(model).items()
        if not name.endswith("down_proj")
    }
    save_quantized(model, tokenizer, layers, folder)
    return folder


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train, validation and test records; calibration and held-out text."""
    folder = tmp_path_factory.mktemp("data")
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(8)]
    write_jsonl(folder / "train.jsonl", sums)
    write_jsonl(folder / "validation.jsonl", sums[:12])
    write_jsonl(folder / "test.jsonl", sums[20:30])
    words = [f"The {n}th line of some text that says {n * n} things about numbers." for n in range(60)]
    write_jsonl(folder / "calibration.jsonl", [{"text": word} for word in words])
    (folder / "heldout.txt").write_text("\n".join(words[::-1]))
    return folder


@pytest.fixture
def raw(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """A complete recipe on the tiny model, as plain data, to be changed."""
    return copy.deepcopy(tiny_recipe)


@pytest.fixture(scope="session")
def tiny_recipe(model_folder: Path, data: Path) -> dict[str, Any]:
    """`raw`, as it is before any test changes it."""
    return {
        "schema": 1,
        "name": "tiny",
        "model": {"path": str(model_folder)},
        "calibration": {"data": str(data / "calibration.jsonl"), "samples": 4, "length": 32},
        "sparsify": {"scorer": "wanda"},
        "finetune": {
            "adapter": {"name": "nls", "options": {"ranks": [8, 6, 4], "alpha": 16}},
            "merger": "sparsepeft",
            "targets": TARGETS,
            "data": str(data / "train.jsonl"),
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 0.01,
            "save_every": 2,
        },
        "search": {
            "searcher": {"name": "hill-climbing", "options": {"turns": 1, "neighbors": 2, "samples": 8}},
            "data": str(data / "validation.jsonl"),
            "metric": "loss",
        },
        "merge": {},
        "evaluate": {
            "of": ["model", "sparsify", "finetune:maximal", "search", "merge"],
            "perplexity": {"text": str(data / "heldout.txt"), "tokens": 256, "length": 64},
            "exact_match": {"data": str(data / "test.jsonl"), "max_new_tokens": 4},
        },
    }


@pytest.fixture
def registry() -> Registry:
    return Registry.discover()
