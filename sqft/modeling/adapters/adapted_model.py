"""A base model with its trained deltas."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.modeling.adapters.adapted_linear import AdaptedLinear, MergedLinear, set_ranks
from sqft.types import RankConfig, SearchSpace


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
