"""Models as they would be served: what is in bfloat16, what the int4 kernel takes, and what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.adapters.frozen_weight import PackedLinear, PackedWeight, SparseWeight
from sqft.modeling.loading import load_packed
from sqft.tools.serving import count_kernel_layers, load_merged_for_serving, measure_speed, prepare_for_serving


def test_floats_are_served_in_bfloat16(model_folder: Path) -> None:
    model = load_merged_for_serving(ModelSpec(model_folder, "float32"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training
    assert count_kernel_layers(model) == (0, 0)


def test_codes_stay_codes(quantized_folder: Path) -> None:
    """In act-order no kernel takes them; grids keep their precision."""
    model = load_merged_for_serving(ModelSpec(quantized_folder))
    packed = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert count_kernel_layers(model) == (0, len(packed)) and len(packed) == 12
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    stored = load_packed(ModelSpec(quantized_folder))
    for one, other in zip(packed, (m for m in stored.modules() if isinstance(m, PackedWeight)), strict=True):
        grid, kept = one.grid(), other.grid()
        assert grid is not None and kept is not None and one.dtype == torch.bfloat16
        assert torch.equal(grid.scale, kept.scale) and torch.equal(one.packed, other.packed)


def test_a_packed_base_is_served_as_floats(model: LlamaForCausalLM) -> None:
    linear = model.model.layers[0].mlp.up_proj
    linear.weight.data.view(-1)[::2] = 0
    weight = linear.weight.detach().clone()
    model.set_submodule("model.layers.0.mlp.up_proj", PackedLinear(SparseWeight(weight, True), None))
    layer = prepare_for_serving(model).get_submodule("model.layers.0.mlp.up_proj")
    assert layer.base.held is not None and layer.base.held.equal(weight.bfloat16())
    x = torch.randn(3, 32).bfloat16()
    assert layer(x).equal(torch.nn.functional.linear(x, weight.bfloat16()))


def test_a_model_is_prepared_in_place(model: LlamaForCausalLM) -> None:
    assert prepare_for_serving(model.train()) is model and not model.training


@pytest.mark.parametrize("repeats", [1, 2])
def test_speeds_count_tokens(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, repeats: int) -> None:
    """By a clock that ticks once a reading: every phase takes one second."""
    ticks = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: calls.append(inputs["input_ids"].shape[1]), with_kwargs=True)
    measured = measure_speed(model, 7, 3, repeats)
    assert (measured.prefill, measured.decode) == (7.0, 3.0)
    assert calls == [7, 1, 1, 1] * repeats
