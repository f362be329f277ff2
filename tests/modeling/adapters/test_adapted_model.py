"""An adapted model counts and names what trains in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sqft_nls.delta import LowRankDelta
from sqft_sparsepeft import QASparsePEFT, SparsePEFT
from sqft_unmerged import Unmerged
from torch import Tensor

from sqft.api import Merger, RankConfig
from sqft.modeling.adapters.adapted_model import AdaptedModel

Make = Callable[..., AdaptedModel]


def largest(adapted: AdaptedModel) -> RankConfig:
    return RankConfig(tuple(max(group.ranks) for group in adapted.space.groups))


def smallest(adapted: AdaptedModel) -> RankConfig:
    return RankConfig(tuple(min(group.ranks) for group in adapted.space.groups))


@pytest.mark.parametrize("learn_scales", [False, True])
def test_parameters_are_those_of_the_slices(adapted_model: Make, learn_scales: bool) -> None:
    adapted = adapted_model(QASparsePEFT(), learn_scales)
    scales = 2 * (6 + 4) if learn_scales else 0
    assert adapted.parameter_count(smallest(adapted)) == 2 * (6 + 8) + 2 * (4 + 8) + scales
    assert adapted.parameter_count(largest(adapted)) == adapted.trainable == 3 * (6 + 8) + 3 * (4 + 8) + scales
    named = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert len(adapted.deltas()) == len(named)


def test_ranks_are_set_for_every_layer(adapted_model: Make) -> None:
    adapted = adapted_model(SparsePEFT())
    adapted.set_ranks(smallest(adapted))
    assert {layer.rank for layer in adapted.layers.values()} == {2}


@pytest.mark.parametrize(("merger", "count"), [(SparsePEFT(), 2), (Unmerged(), 0)], ids=["merged", "side path"])
def test_which_layers_have_an_effective_weight(adapted_model: Make, merger: Merger, count: int) -> None:
    adapted = adapted_model(merger)
    assert len(adapted.layers) == 2 and len(adapted.mergeable) == count
    assert all((layer.effective() is None) == (not count) for layer in adapted.layers.values())


def test_what_trains_can_be_put_into_another_model(adapted_model: Make) -> None:
    one, other = adapted_model(QASparsePEFT(), True), adapted_model(QASparsePEFT(), True)
    for value in one.deltas().values():
        value.add_(1)  # views of what trains
    assert all(not value.equal(other.deltas()[name]) for name, value in one.deltas().items())
    for name, layer in other.layers.items():
        layer.load_trainable_tensors(one.layers[name].trainable_tensors())
    assert all(value.equal(other.deltas()[name]) for name, value in one.deltas().items())


class ScaledByRank(LowRankDelta):
    """Each rank has a scale of its own, as where alpha is divided by the rank in use."""

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        B, A, scale = super().factors(rank)
        return B, A, scale / rank


@pytest.mark.parametrize("kind", [LowRankDelta, ScaledByRank])
def test_what_a_rank_costs_and_what_its_deltas_lose(
    adapted_model: Make, kind: type[LowRankDelta], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the norms of the complete matrices."""
    adapted = adapted_model(SparsePEFT())
    for layer in adapted.layers.values():
        monkeypatch.setattr(layer.delta, "__class__", kind)
        for parameter in layer.delta.parameters():  # type: ignore[attr-defined]
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
    space = adapted.measured_space()
    for choice in (largest(adapted), smallest(adapted)):
        assert space.parameters(choice) == adapted.parameter_count(choice)
    for before, group in zip(adapted.space.groups, space.groups, strict=True):
        assert (before.name, before.ranks, before.members) == (group.name, group.ranks, group.members)
        for rank, loss in zip(group.ranks, group.losses, strict=True):
            expected = 0.0
            for layer in (adapted.layers[name] for name in group.members):
                full, less = (B @ A * scale for B, A, scale in map(layer.delta.factors, (group.ranks[0], rank)))
                expected += float((full - less).detach().double().square().sum())
            assert loss == pytest.approx(expected, rel=1e-5)
        assert group.losses[0] == 0
