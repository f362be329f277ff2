"""A small adapted model, in code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sqft_nls.adapter import Nls
from torch import nn
from transformers import PreTrainedTokenizerFast

from sqft.api import Grid, LinearShape, Merger
from sqft.kernels.grids import fit_grid
from sqft.modeling.adapters.adapted_linear import attach
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.frozen_weight import FloatWeight

SHAPES = (LinearShape("h.0.one", 6, 8), LinearShape("h.0.two", 4, 8))


def make(tokenizer: PreTrainedTokenizerFast, merger: Merger, learn_scales: bool = False) -> AdaptedModel:
    """Two layers on grids of two groups a row, with ranks of 3 and 2 to choose from."""
    torch.manual_seed(0)
    model: Any = nn.ModuleDict(
        {"h": nn.ModuleList([nn.ModuleDict({"one": nn.Linear(8, 6), "two": nn.Linear(8, 4, bias=False)})])}
    )
    adapter = Nls(ranks=(3, 2), alpha=6.0)
    deltas, bases = {}, {}
    for shape in SHAPES:
        weight = model.get_submodule(shape.name).weight.detach()
        scale, zero = fit_grid(weight.reshape(shape.out_features, 2, 4), 4, False)
        deltas[shape.name] = adapter.delta(shape, torch.Generator().manual_seed(1))
        bases[shape.name] = FloatWeight(weight, True, Grid(scale, zero, 4, 4))
    layers = attach(model, deltas, merger, bases, learn_scales=learn_scales)
    for layer in layers.values():
        layer.delta.B.data.normal_()  # type: ignore[attr-defined]
    model.config = SimpleNamespace(model_type="llama")
    return AdaptedModel(model, tokenizer, layers, adapter.space(SHAPES))


@pytest.fixture
def adapted_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., AdaptedModel]:
    return partial(make, tokenizer)
