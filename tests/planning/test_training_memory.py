"""What training needs, written out by hand. Teachers: test_distillation.py."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from sqft_nls.adapter import Nls
from sqft_sparsepeft import SparsePEFT
from sqft_unmerged import Unmerged
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.components.kinds import Merger
from sqft.modeling.adapters.adapted_linear import attach
from sqft.modeling.adapters.frozen_weight import FloatWeight
from sqft.modeling.architecture.blocks import linears, shape_of
from sqft.planning.training_memory import activation_bytes, estimate_finetune, gradient_bytes, layer_bytes
from sqft.recipe.sections import Finetune

SIZES = {"hidden_size": 32, "vocab_size": 10, "num_hidden_layers": 2, "intermediate_size": 64}
LAYER = 14 * 32 + 4 * 64
"""Floats that a layer keeps of each token."""


@pytest.mark.parametrize(
    ("settings", "kept", "labels"),
    [
        ({}, 2 * LAYER, 16),
        ({"gradient_checkpointing": True}, 2 * 32 + LAYER, 16),  # the inputs of both, and one that is computed again
        ({"loss_on": "all"}, 2 * LAYER, 64),
        ({"loss_on": "all", "loss_chunk": 5}, 2 * LAYER, 5),
    ],
)
def test_bytes_of_activations(settings: dict[str, Any], kept: int, labels: int) -> None:
    section = Finetune.model_validate(
        {"adapter": "nls", "merger": "sparsepeft", "data": "a", "batch_size": 4, "max_length": 16, **settings}
    )
    source = ModelSource("folder", Path("m"), "", {}, ModelLayout(sizes=SIZES))
    assert activation_bytes(source, "float32", section) == 4 * (4 * 16 * kept + 10 * 3 * labels)
    estimate = estimate_finetune(source, "float32", section, 100, 7)
    assert (estimate.parameters, estimate.storage) == (100, 400)
    assert estimate.memory == 7 + 16 * 100 + activation_bytes(source, "float32", section) + (1 << 29)


def test_gradients_of_one_example_keep_its_activations() -> None:
    """Whatever training does: nothing is computed again, and no teacher's prediction is kept."""
    section = {"adapter": "nls", "merger": "sparsepeft", "data": "a", "max_length": 16, "batch_size": 1}
    source = ModelSource("folder", Path("m"), "", {}, ModelLayout(sizes=SIZES))
    plain = activation_bytes(source, "float32", Finetune.model_validate(section))
    other = section | {"batch_size": 4, "gradient_checkpointing": True, "precision": "bfloat16"}
    assert gradient_bytes(source, "float32", Finetune.model_validate(other)) == plain
    chunked = Finetune.model_validate(section | {"loss_chunk": 1})  # the search computes its loss so, too
    fewer = activation_bytes(source, "float32", chunked)
    assert gradient_bytes(source, "float32", chunked) == fewer < plain


TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
BATCH = 2


def model_of(layers: int, sizes: dict[str, int]) -> LlamaModel:
    config = LlamaConfig(num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, vocab_size=99, **sizes)
    return LlamaModel(config).requires_grad_(False)


def kept_bytes(
    layers: int, sizes: dict[str, int], dtype: torch.dtype, autocast: bool, length: int, merger: Merger
) -> int:
    """What autograd keeps of a forward pass through a sparse Llama with adapters, but its parameters."""
    model = model_of(layers, sizes).to(dtype)
    adapted = {name: layer for name, layer in linears(model).items() if name.endswith(TARGETS)}
    generator = torch.Generator().manual_seed(0)
    deltas = {name: Nls(ranks=(8,)).delta(shape_of(name, layer), generator) for name, layer in adapted.items()}
    attach(model, deltas, merger, {name: FloatWeight(layer.weight, True) for name, layer in adapted.items()}, 0)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            kept[place] = tensor
        return tensor

    inputs = torch.randn(BATCH, length, sizes["hidden_size"], dtype=dtype, requires_grad=True)
    within = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), within:
        model(inputs_embeds=inputs, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def one_layer(dtype: str, precision: str, sizes: tuple[int, int], length: int, merger: Merger) -> tuple[int, int]:
    """What the plan counts of a layer, and what autograd keeps of one."""
    named = dict(zip(("hidden_size", "intermediate_size"), sizes, strict=True))
    settings = {"adapter": "nls", "merger": "sparsepeft", "data": "a", "batch_size": BATCH, "max_length": length}
    section = Finetune.model_validate(settings | {"precision": precision})
    linears_ = tuple(shape_of(name, layer) for name, layer in linears(model_of(1, named)).items())
    source = ModelSource("folder", Path("m"), "", {}, ModelLayout(sizes=named, linears=linears_))
    autocast = precision == "bfloat16"
    one, two = (kept_bytes(n, named, getattr(torch, dtype), autocast, length, merger) for n in (1, 2))
    return layer_bytes(source, dtype, section), two - one


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)


@PRECISIONS
@pytest.mark.parametrize("sizes", [(256, 512), (256, 1024)], ids=str)
def test_a_layer_keeps_no_more_and_more_than_a_third_of_it(dtype: str, precision: str, sizes: tuple[int, int]) -> None:
    planned, kept = one_layer(dtype, precision, sizes, 256, SparsePEFT())
    assert planned / 3 < kept <= planned


@PRECISIONS
@pytest.mark.parametrize("merger", [SparsePEFT(), Unmerged()], ids=lambda merger: merger.name)
def test_few_tokens_in_a_wide_layer(dtype: str, precision: str, merger: Merger) -> None:
    """Under autocast it is the copies of frozen weights that count."""
    planned, kept = one_layer(dtype, precision, (512, 2048), 16, merger)
    assert kept <= planned
