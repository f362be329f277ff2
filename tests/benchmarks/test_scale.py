"""Sizes and operations of `benchmarks/scale.py`, held against a model of transformers and torch's own counter."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


@pytest.fixture(scope="module")
def scale() -> Any:
    place = Path(__file__).parents[2] / "benchmarks" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", place)
    assert spec and spec.loader
    sys.modules["scale"] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def config(shape: Any, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )


@pytest.mark.parametrize(("name", "billions"), [("8b", 8.03), ("70b", 70.55), ("405b", 405.85)])
def test_the_models_have_their_published_sizes(scale: Any, name: str, billions: float) -> None:
    """All but the weights of norms."""
    source = scale.SHAPES[name].source
    assert source.parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    with torch.device("meta"):
        model = LlamaForCausalLM(config(scale.SHAPES[name], scale.VOCABULARY))
    assert source.shapes == {n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() == 2}


def test_operations_of_a_forward_pass(scale: Any) -> None:
    shape, length = scale.Shape(hidden=64, inner=96, layers=3, heads=8, kv_heads=2), 16
    model = LlamaModel(config(shape, 50)).eval()
    model.set_attn_implementation("eager")  # its products are counted one by one
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    assert counter.get_total_flops() == length * shape.forward(length)
