"""The change of the loss by gradients, beside finite differences, removed ranks, and losses that are linear."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from sqft_hira import Hira
from sqft_nls.adapter import Nls
from sqft_nls.delta import LowRankDelta
from sqft_sparsepeft import SparsePEFT
from sqft_unmerged import Unmerged
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from sqft.api import LinearShape, Merger, RankConfig, RankGroup, SearchSpace
from sqft.data.collators import Collator
from sqft.data.encoding import Example
from sqft.modeling.adapters.adapted_linear import attach
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.frozen_weight import FloatWeight
from sqft.modeling.architecture.blocks import linears, shape_of
from sqft.modeling.evaluation.first_order import first_order_changes
from sqft.modeling.training.loss import CompletionLoss
from sqft.utils.progress import silent

RANKS = (4, 3, 1)
TARGETS = ("q_proj", "k_proj", "up_proj")
EXAMPLES = [Example(tuple(range(2, 9)), (-100, -100, *range(4, 9))), Example((5, 3, 9, 7), (5, 3, 9, 7))]


class ScaledByRank(LowRankDelta):
    """Each rank has a scale of its own, as where alpha is divided by the rank in use."""

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        B, A, scale = super().factors(rank)
        return B, A, scale / rank


def adapted_llama(model: LlamaForCausalLM, size: float) -> AdaptedModel:
    """In float64, which mergers do not take: adapters beside queries, keys and up projections, of about this size."""
    for block in model.model.layers:  # Llama's own norms compute in float32
        block.input_layernorm, block.post_attention_layernorm = nn.RMSNorm(32, 1e-6), nn.RMSNorm(32, 1e-6)
    model.model.norm = nn.RMSNorm(32, 1e-6)
    model = model.to(torch.float64)
    shapes = [shape_of(name, layer) for name, layer in linears(model).items() if name.endswith(TARGETS)]
    space = Nls(ranks=RANKS, alpha=4.0).space(shapes)
    return adapt(model, shapes, space, size, Unmerged(), LowRankDelta)


def adapt(
    model: Any, shapes: list[LinearShape], space: SearchSpace, size: float, merger: Merger, kind: type[LowRankDelta]
) -> AdaptedModel:
    generator, deltas, bases = torch.Generator().manual_seed(1), {}, {}
    for shape in shapes:
        weight = model.get_submodule(shape.name).weight.detach()
        deltas[shape.name] = kind(shape, RANKS[0], 2.0, generator).to(weight.dtype)
        drawn = torch.randn(deltas[shape.name].B.shape, generator=generator)
        deltas[shape.name].B.data = size * drawn.to(weight.dtype)
        bases[shape.name] = FloatWeight(weight, True)
    return AdaptedModel(model, Any, attach(model, deltas, merger, bases), space)  # type: ignore[arg-type]


@torch.no_grad()
def summed_loss(adapted: AdaptedModel, config: RankConfig) -> float:
    adapted.set_ranks(config)
    loss = CompletionLoss(adapted.model)
    batches = (Collator(0)([example]) for example in EXAMPLES)
    return sum(float(loss(**batch, num_items_in_batch=1)["loss"]) for batch in batches)


def changed(adapted: AdaptedModel) -> list[list[float]]:
    changes, labels = first_order_changes(adapted, CompletionLoss(adapted.model), EXAMPLES, silent)
    assert labels == 5 + 3
    return changes


def configs(space: SearchSpace) -> list[list[RankConfig]]:
    """For each group and rank: that rank there, and the largest elsewhere."""
    largest = [group.ranks[0] for group in space.groups]
    return [
        [RankConfig((*largest[:index], rank, *largest[index + 1 :])) for rank in group.ranks]
        for index, group in enumerate(space.groups)
    ]


def test_it_is_the_derivative(model: LlamaForCausalLM) -> None:
    """By central differences of the part of the factors that a rank takes away, in float64."""
    adapted, h = adapted_llama(model, 0.5), 1e-5
    found = changed(adapted)
    largest = RankConfig(tuple(group.ranks[0] for group in adapted.space.groups))
    for group, changes in zip(adapted.space.groups, found, strict=True):
        for rank, change in zip(group.ranks, changes, strict=True):
            values = []
            for factor in (1 - h, 1 + h):
                factors: list[Tensor] = [adapted.layers[name].delta.B for name in group.members]  # type: ignore[attr-defined]
                kept = [B.data.clone() for B in factors]
                for B in factors:
                    B.data[:, rank:] *= factor
                values.append(summed_loss(adapted, largest))
                for B, before in zip(factors, kept, strict=True):
                    B.data = before
            assert change == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-9)
        assert changes[0] == 0 and min(abs(change) for change in changes[1:]) > 1e-4


def test_of_small_deltas_it_is_what_taking_ranks_away_does(model: LlamaForCausalLM) -> None:
    """The error falls with the square of the deltas' size."""
    errors = []
    for size in (2e-3, 1e-3):
        adapted = adapted_llama(deepcopy(model), size)
        found = changed(adapted)
        whole = summed_loss(adapted, configs(adapted.space)[0][0])
        real = [[summed_loss(adapted, config) - whole for config in group] for group in configs(adapted.space)]
        errors.append(torch.tensor(found) - torch.tensor(real))
        assert errors[-1].abs().max() < 0.02 * torch.tensor(real).abs().max()
    assert errors[0].abs().max() / errors[1].abs().max() == pytest.approx(4, rel=0.1)


class Linear(nn.Module):
    """A loss that is linear in the weights of two layers, of which the second is not always used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.one, self.two = nn.Embedding(12, 8), nn.Linear(8, 6), nn.Linear(8, 4)
        self.one.weight.data[::2] = 0

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: int, **_: Any) -> dict[str, Tensor]:
        x = self.table(input_ids)
        weights = torch.arange(1.0, 7.0)
        return {"loss": (self.one(x) @ weights).sum() + (self.two(x).sum() if len(input_ids[0]) == 4 else 0)}


@pytest.mark.parametrize("merger", [SparsePEFT(), Hira(), Unmerged()], ids=lambda merger: str(merger.name))
@pytest.mark.parametrize("kind", [LowRankDelta, ScaledByRank])
def test_of_a_linear_loss_it_is_exact(kind: type[LowRankDelta], merger: Merger) -> None:
    """Through the mask of a sparse base too, and where each rank has a scale of its own."""
    shapes = [LinearShape("one", 6, 8), LinearShape("two", 4, 8)]
    space = SearchSpace(tuple(RankGroup(shape.name, RANKS, (shape.name,)) for shape in shapes))
    adapted = adapt(Linear(), shapes, space, 1.0, merger, kind)
    deltas = {name: layer.delta for name, layer in adapted.layers.items()}
    adapted.model.train()
    found, _ = first_order_changes(adapted, adapted.model, EXAMPLES, silent)  # type: ignore[arg-type]

    @torch.no_grad()
    def total(config: RankConfig) -> float:
        adapted.set_ranks(config)
        return sum(float(adapted.model(**Collator(0)([e]), num_items_in_batch=1)["loss"]) for e in EXAMPLES)

    for group, changes in zip(configs(space), found, strict=True):
        real = [total(config) - total(group[0]) for config in group]
        assert changes == pytest.approx(real, rel=1e-4, abs=1e-4) and any(changes)
    assert {name: layer.delta for name, layer in adapted.layers.items()} == deltas and adapted.model.training
    assert all(parameter.grad is None for parameter in adapted.model.parameters())


def test_a_layer_that_nothing_reaches_loses_nothing() -> None:
    shapes = [LinearShape("one", 6, 8), LinearShape("two", 4, 8)]
    space = SearchSpace(tuple(RankGroup(shape.name, RANKS, (shape.name,)) for shape in shapes))
    adapted = adapt(Linear(), shapes, space, 1.0, SparsePEFT(), LowRankDelta)
    found, _ = first_order_changes(adapted, adapted.model, EXAMPLES[:1], silent)  # type: ignore[arg-type]
    assert any(found[0]) and not any(found[1])
