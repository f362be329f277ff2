"""A base model with its trained deltas."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.modeling.adapters.adapted_linear import AdaptedLinear, set_ranks
from sqft.types import RankConfig, SearchSpace


@dataclass(frozen=True)
class AdaptedModel:
    """The adapted model of one `finetune` step."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapted: dict[str, AdaptedLinear]
    space: SearchSpace

    def set_ranks(self, choice: RankConfig) -> None:
        """Set every layer's rank."""
        set_ranks(self.adapted, self.space.ranks_by_linear(choice))

    def trained(self, choice: RankConfig) -> int:
        """Parameters of the sub-adapter of a configuration."""
        ranks = self.space.ranks_by_linear(choice)
        factors = sum(ranks[n] * (layer.in_features + layer.out_features) for n, layer in self.adapted.items())
        return factors + sum(
            layer.scale_multiplier.numel() for layer in self.adapted.values() if layer.scale_multiplier is not None
        )

    def deltas(self) -> dict[str, Tensor]:
        """What trains, by name."""
        return {
            f"{name}.{key}": value.detach().contiguous()
            for name, layer in self.adapted.items()
            for key, value in layer.trained().items()
        }

    @property
    def trainable(self) -> int:
        return sum(tensor.numel() for tensor in self.deltas().values())
