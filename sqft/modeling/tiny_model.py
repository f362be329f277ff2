"""A tiny model of random weights, made without a network: what the contract suite gives an exporter to write."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sqft.kernels.grids import fit_grid, quantize
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.quantized import save_quantized
from sqft.types import Grid, Quantized

BITS, GROUP_SIZE = 4, 32


def tiny_model(folder: Path, codes: bool = False) -> FinishedModel:
    """Write a Llama of two blocks, half of its weights zero, always the same, with a byte-level BPE tokenizer.

    Args:
        folder: is made, and holds the model.
        codes: whether its linear layers are codes of 4 bits, in symmetric groups of 32 inputs, as GPTQ stores them.
    """
    tokenizer = _tokenizer()
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05, generator=generator)
        for layer in linears(model).values():
            layer.weight.masked_fill_(layer.weight.abs() <= layer.weight.abs().median(), 0)
    if codes:
        layers = {name: _rounded(layer.weight.detach()) for name, layer in linears(model).items()}
        save_quantized(model, tokenizer, layers, folder)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return FinishedModel(folder)


def _rounded(weight: torch.Tensor) -> Quantized:
    """Round a weight [out, in] to nearest."""
    scale, zero = fit_grid(weight.reshape(len(weight), -1, GROUP_SIZE), BITS, True)
    grid = Grid(scale.half(), zero, GROUP_SIZE, BITS)
    return Quantized(quantize(weight, grid), grid)


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|endoftext|>", *alphabet, "th", "the"]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[("t", "h"), ("th", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=vocabulary[0], pad_token=vocabulary[0])
