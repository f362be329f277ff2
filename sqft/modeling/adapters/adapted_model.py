"""A base model with its trained deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.modeling.adapters.adapted_linear import AdaptedLinear, MergedLinear, set_ranks
from sqft.ranks import RankConfig, RankGroup, SearchSpace
from sqft.types import DeltaModule


@dataclass(frozen=True)
class AdaptedModel:
    """The adapted model of one `finetune` step; `layers` are its adapted layers by full name."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: dict[str, AdaptedLinear]
    space: SearchSpace

    @property
    def mergeable(self) -> dict[str, MergedLinear]:
        """The layers that have an effective weight: all, or none where the adapters stay beside their bases."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, MergedLinear)}

    def set_ranks(self, config: RankConfig) -> None:
        """Set every layer's rank."""
        set_ranks(self.layers, self.space.ranks_by_linear(config))

    def parameter_count(self, config: RankConfig) -> int:
        """Count the parameters of a configuration's sub-adapter."""
        ranks = self.space.ranks_by_linear(config)
        factors = sum(ranks[name] * (layer.in_features + layer.out_features) for name, layer in self.layers.items())
        return factors + sum(
            layer.scale_multiplier.numel() for layer in self.layers.values() if layer.scale_multiplier is not None
        )

    def measured_space(self) -> SearchSpace:
        """Return the space with what a rank costs in each group, and what the trained deltas lose at each."""

        def measured(group: RankGroup) -> RankGroup:
            layers = [self.layers[name] for name in group.members]
            cost = sum(layer.in_features + layer.out_features for layer in layers)
            losses = zip(*(_losses(layer.delta, group.ranks) for layer in layers), strict=True)
            return replace(group, cost=cost, losses=tuple(map(sum, losses)))

        return SearchSpace(tuple(map(measured, self.space.groups)))

    def deltas(self) -> dict[str, Tensor]:
        """Return what trains, by full name."""
        return {
            f"{name}.{key}": value.detach().contiguous()
            for name, layer in self.layers.items()
            for key, value in layer.trainable_tensors().items()
        }

    @property
    def trainable(self) -> int:
        """The number of parameters that train, at the largest ranks."""
        return sum(tensor.numel() for tensor in self.deltas().values())


@torch.no_grad()
def _losses(delta: DeltaModule, ranks: Sequence[int]) -> list[float]:
    """Compute ‖Δ_R − Δ_r‖² (Frobenius) of each rank r, R being the largest.

    The difference is Σᵢ cᵢ bᵢ aᵢᵀ over the columns of B and rows of A, with cᵢ = scale_R − scale_r where r keeps i, and
    scale_R where it does not. So its norm is cᵀ (BᵀB ∘ AAᵀ) c: no matrix of the layer's size is made.
    """
    B, A, scale = delta.factors(delta.rank)
    gram = (B.T.double() @ B.double()) * (A.double() @ A.T.double())  # [R, R]
    losses = []
    for rank in ranks:
        weights = torch.full((delta.rank,), float(scale), dtype=gram.dtype, device=gram.device)
        weights[:rank] -= float(delta.factors(rank)[2])
        losses.append(max(0.0, (weights @ gram @ weights).item()))  # rounding may leave a little less than 0
    return losses
