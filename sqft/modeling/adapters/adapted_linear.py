"""A linear layer with an adapter: base, delta and merger become one forward and one backward.

`_merged` is the only place where a merger is called: training's forward, its backward and the merge take
their weights from there, so "merging loses nothing" holds by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqft.components.kinds import Merger
from sqft.errors import StageError
from sqft.modeling.adapters.effective_weight import EffectiveLinear, EffectiveWeight, effective_codes, effective_weight
from sqft.modeling.adapters.frozen_weight import FrozenWeight, PackedLinear, dequantized
from sqft.types import DeltaModule, Quantized


class AdaptedLinear(nn.Module):
    """A frozen linear layer [in] → [out] with a trainable low-rank delta.

    `rank` is the rank in use, at first the largest. A merger that merges runs through the effective
    weight; one that does not takes the ordinary two paths, W x + scale · B A x. Dropout on the
    adapter's input is no function of a weight, so with it a merger trains through two paths as well,
    W x + (W_eff − W) dropout(x), at the cost of both.
    """

    def __init__(
        self,
        base: FrozenWeight,
        bias: Tensor | None,
        delta: DeltaModule,
        merger: Merger,
        dropout: float = 0.0,
        learn_scales: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.bias = base, bias
        self.delta, self.merger = delta, merger
        # What the grid's scales are multiplied by, [out, groups], where they train too.
        self.scale_multiplier: nn.Parameter | None = None
        if learn_scales and base.scale is not None:
            self.scale_multiplier = nn.Parameter(torch.ones_like(base.scale, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)
        self.rank = delta.rank
        self.cached: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that acts, for a model that reads it (Mamba does); adapters train through it."""
        if self.cached is not None:
            return self.cached
        B, A, scale = self.delta.factors(self.rank)
        if not self.merger.merges:
            return self.base.dense() + (B @ A * scale).to(self.base.dtype)
        whole: Tensor = EffectiveWeight.apply(B, A, self.scale_multiplier, scale, self.merger, self.base)  # type: ignore[no-untyped-call]
        return whole

    def effective(self) -> Tensor:
        """The effective weight [out, in] at the current rank, in the base's dtype.

        Raises:
            StageError: when the merger keeps the adapter beside the base.
        """
        return effective_weight(self.merger, self.base, *self._factors())

    def codes(self) -> Quantized:
        """The codes of the effective weight on the base's grid.

        Raises:
            StageError: when the merger keeps the adapter beside the base, or the base has no grid.
        """
        return effective_codes(self.merger, self.base, *self._factors())

    def trained(self) -> dict[str, Tensor]:
        """What trains, by name."""
        held: dict[str, Tensor] = cast(nn.Module, self.delta).state_dict()
        if self.scale_multiplier is None:
            return held
        return {**held, "grid.scale_multiplier": self.scale_multiplier.detach()}

    def load_trained(self, stored: Mapping[str, Tensor]) -> None:
        """Take what `trained` gave."""
        own = dict(stored)
        if self.scale_multiplier is not None:
            self.scale_multiplier.data.copy_(own.pop("grid.scale_multiplier"))
        cast(nn.Module, self.delta).load_state_dict(own)

    def _factors(self) -> tuple[Tensor, Tensor, float, Tensor | None]:
        if not self.merger.merges:
            raise StageError(f"merger '{self.merger.name}' has no effective weight: its adapter stays beside the base")
        B, A, scale = self.delta.factors(self.rank)
        return B.detach(), A.detach(), scale, self.scale_multiplier

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is not None:
            return F.linear(x, self.cached, self.bias)
        B, A, scale = self.delta.factors(self.rank)
        if not self.merger.merges:
            side = F.linear(self.dropout(x), A.to(x.dtype))
            return self.base.linear(x, self.bias) + F.linear(side, B.to(x.dtype)) * scale
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.training and self.dropout.p > 0:
            # Not the difference of two outputs: in bfloat16 that would lose a small delta's digits.
            side = self._through(self.dropout(x), None, B, A, scale, delta_only=True)
            return self.base.linear(x, self.bias) + side
        return self._through(x, self.bias, B, A, scale)

    def _through(
        self, x: Tensor, bias: Tensor | None, B: Tensor, A: Tensor, scale: float, delta_only: bool = False
    ) -> Tensor:
        y: Tensor = EffectiveLinear.apply(
            x, bias, B, A, self.scale_multiplier, scale, self.merger, self.base, delta_only
        )  # type: ignore[no-untyped-call]
        return y


def attach(
    model: nn.Module,
    deltas: Mapping[str, DeltaModule],
    merger: Merger,
    bases: Mapping[str, FrozenWeight],
    dropout: float = 0.0,
    learn_scales: bool = False,
) -> dict[str, AdaptedLinear]:
    """Freeze the model and put an `AdaptedLinear` over its base in place of each named linear layer."""
    model.requires_grad_(False)
    adapted = {}
    for name, delta in deltas.items():
        parent, _, last = name.rpartition(".")
        bias = model.get_submodule(name).bias
        assert bias is None or isinstance(bias, Tensor)
        layer = AdaptedLinear(bases[name], bias, delta, merger, dropout, learn_scales)
        adapted[name] = layer.train(model.training)
        setattr(model.get_submodule(parent), last, adapted[name])
    return adapted


def set_ranks(adapted: Mapping[str, AdaptedLinear], ranks: Mapping[str, int]) -> None:
    """Set the rank of every adapted layer."""
    for name, layer in adapted.items():
        layer.rank = ranks[name]


def acting_weight(module: nn.Module) -> Tensor | None:
    """The weight that a module acts with, if it has one; of an adapter that stays beside the base, the base's."""
    if isinstance(module, AdaptedLinear):
        return module.effective() if module.merger.merges else module.base.dense()
    if isinstance(module, PackedLinear):
        return module.base.dense()
    return None if isinstance(module, FrozenWeight) else getattr(module, "weight", None)


@contextmanager
def cached_effective_weights(model: nn.Module) -> Iterator[None]:
    """Inside, each layer holds the weight it acts with as floats, so that evaluation runs at the base's speed."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    try:
        for layer in adapted:
            layer.cached = layer.effective() if layer.merger.merges else None
        with dequantized(module for module in model.modules() if getattr(module, "cached", None) is None):
            yield
    finally:
        for layer in adapted:
            layer.cached = None
