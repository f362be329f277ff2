"""A linear layer with an adapter, in two forms: through the effective weight, or with the adapter beside its base.

Which one a layer takes is decided once, by `adapt`, from what the merger says of itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqft.components.kinds import Merger
from sqft.modeling.adapters.effective_weight import (
    EffectiveLinear,
    EffectiveWeight,
    Factors,
    effective_codes,
    effective_weight,
)
from sqft.modeling.adapters.frozen_weight import FrozenWeight, PackedLinear, dequantized, in_autocast
from sqft.modeling.architecture.linears import stored_transposed
from sqft.types import DeltaModule, Quantized


class AdaptedLinear(nn.Module):
    """A frozen linear layer [in] → [out] with a trainable low-rank delta, in one of the two forms below.

    `rank` is the rank in use, at first the largest.
    """

    def __init__(self, base: FrozenWeight, bias: Tensor | None, delta: DeltaModule, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.bias = base, bias
        self.delta = delta
        self.scale_multiplier: nn.Parameter | None = None
        """What the scales of the base's grid are multiplied by, [out, groups], where they train too."""
        self.dropout = nn.Dropout(dropout)
        self.rank = delta.rank
        self.cached: Tensor | None = None
        self.stored_transposed = False
        """Whether transformers stores the layer's weight as [in, out]."""

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] that acts, for a model that reads it (Mamba does); adapters train through it."""
        raise NotImplementedError

    def effective(self) -> Tensor | None:
        """Compute the one weight [out, in] that the layer is at its current rank; None when it is no single weight."""
        raise NotImplementedError

    def parameters_of_B(self) -> list[nn.Parameter]:
        """Return the parameters that B is made of, and A is not.

        Found by where gradients lead, so that a delta may hold its parameters under any names.
        """
        B, A, _ = self.delta.factors(self.delta.rank)
        own = [parameter for parameter in cast(nn.Module, self.delta).parameters() if parameter.requires_grad]

        def makes(factor: Tensor) -> list[bool]:
            if not factor.requires_grad:
                return [False] * len(own)
            # Both may come from one graph.
            found = torch.autograd.grad(factor.sum(), own, retain_graph=True, allow_unused=True)
            return [grad is not None for grad in found]

        return [p for p, in_B, in_A in zip(own, makes(B), makes(A), strict=True) if in_B and not in_A]

    def trainable_tensors(self) -> dict[str, Tensor]:
        """Return what trains, by name."""
        held: dict[str, Tensor] = cast(nn.Module, self.delta).state_dict()
        if self.scale_multiplier is None:
            return held
        return {**held, "grid.scale_multiplier": self.scale_multiplier.detach()}

    def load_trainable_tensors(self, stored: Mapping[str, Tensor]) -> None:
        """Take values for all of `trainable_tensors`."""
        own = dict(stored)
        if self.scale_multiplier is not None:
            self.scale_multiplier.data.copy_(own.pop("grid.scale_multiplier"))
        cast(nn.Module, self.delta).load_state_dict(own)


class MergedLinear(AdaptedLinear):
    """y = x W_effᵀ + b: the layer that training sees is the one that the merge stores.

    Dropout on the adapter's input is no function of a weight, so with it training takes two paths,
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
        super().__init__(base, bias, delta, dropout)
        self.merger = merger
        if learn_scales and base.scale is not None:
            self.scale_multiplier = nn.Parameter(torch.ones_like(base.scale, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        if self.cached is not None:
            return self.cached
        B, A, scale = self.delta.factors(self.rank)
        weight: Tensor = EffectiveWeight.apply(B, A, self.scale_multiplier, scale, self.merger, self.base)  # type: ignore[no-untyped-call]
        return weight

    def effective(self) -> Tensor:
        """Compute the effective weight [out, in] at the current rank, in the base's dtype."""
        return effective_weight(self.merger, self.base, self._factors())

    def codes(self) -> Quantized:
        """Compute the codes of the effective weight on the base's grid.

        Raises:
            StageError: when the base has no grid.
        """
        return effective_codes(self.merger, self.base, self._factors())

    def _factors(self) -> Factors:
        B, A, scale = self.delta.factors(self.rank)
        return Factors(B.detach(), A.detach(), scale, self.scale_multiplier)

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is not None:
            return F.linear(x, self.cached, self.bias)
        x = in_autocast(x)
        if self.training and self.dropout.p > 0:
            # Not the difference of two outputs: in bfloat16 that would lose a small delta's digits.
            return self.base.linear(x, self.bias) + self.delta_linear(self.dropout(x))
        return self._through(x, self.bias, delta_only=False)

    def delta_linear(self, x: Tensor) -> Tensor:
        """Compute x (W_eff − W)ᵀ of x [..., in]."""
        return self._through(x, None, delta_only=True)

    def _through(self, x: Tensor, bias: Tensor | None, delta_only: bool) -> Tensor:
        B, A, scale = self.delta.factors(self.rank)
        y: Tensor = EffectiveLinear.apply(
            x, bias, B, A, self.scale_multiplier, scale, self.merger, self.base, delta_only
        )  # type: ignore[no-untyped-call]
        return y


class SidePathLinear(AdaptedLinear):
    """y = x Wᵀ + b + scale · dropout(x) Aᵀ Bᵀ: the adapter stays beside its base, as in stock PEFT."""

    @property
    def weight(self) -> Tensor:
        B, A, scale = self.delta.factors(self.rank)
        return self.base.dense() + (B @ A * scale).to(self.base.dtype)

    def effective(self) -> None:
        """Return None: base and adapter are two weights, kept apart."""

    def forward(self, x: Tensor) -> Tensor:
        B, A, scale = self.delta.factors(self.rank)
        side = F.linear(self.dropout(x), A.to(x.dtype))  # [..., r]
        return self.base.linear(x, self.bias) + F.linear(side, B.to(x.dtype)) * scale  # [..., out]


def adapt(
    base: FrozenWeight,
    bias: Tensor | None,
    delta: DeltaModule,
    merger: Merger,
    dropout: float = 0.0,
    learn_scales: bool = False,
) -> AdaptedLinear:
    """Make the adapted layer that a merger asks for: the one place that decides between the two forms.

    Args:
        base: the frozen weight [out, in].
        bias: [out].
        delta: what trains.
        merger: what defines the effective weight, or leaves the adapter beside the base.
        dropout: of the adapter's input, in training.
        learn_scales: whether the scales of the base's grid train too.
    """
    if merger.merges:
        return MergedLinear(base, bias, delta, merger, dropout, learn_scales)
    return SidePathLinear(base, bias, delta, dropout)


def attach(
    model: nn.Module,
    deltas: Mapping[str, DeltaModule],
    merger: Merger,
    bases: Mapping[str, FrozenWeight],
    dropout: float = 0.0,
    learn_scales: bool = False,
) -> dict[str, AdaptedLinear]:
    """Freeze the model and put an `AdaptedLinear` over its base in place of each named linear layer.

    Args:
        model: changed in place.
        deltas: what trains, by the layer's name.
        merger: what defines the effective weights, or leaves the adapters beside their bases.
        bases: the frozen weights, by the layer's name.
        dropout: of an adapter's input, in training.
        learn_scales: whether the scales of the bases' grids train too.
    """
    model.requires_grad_(False)
    adapted = {}
    for name, delta in deltas.items():
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        bias = linear.bias
        assert bias is None or isinstance(bias, Tensor)
        layer = adapt(bases[name], bias, delta, merger, dropout, learn_scales)
        layer.stored_transposed = stored_transposed(linear)
        adapted[name] = layer.train(model.training)
        setattr(model.get_submodule(parent), last, adapted[name])
    return adapted


def set_ranks(adapted: Mapping[str, AdaptedLinear], ranks: Mapping[str, int]) -> None:
    """Set the rank of every adapted layer."""
    for name, layer in adapted.items():
        layer.rank = ranks[name]


def acting_weight(module: nn.Module) -> Tensor | None:
    """Return the weight that a module acts with, if it has one; of an adapter beside its base, the base's."""
    if isinstance(module, AdaptedLinear):
        merged = module.effective()
        return merged if merged is not None else module.base.dense()
    if isinstance(module, PackedLinear):
        return module.base.dense()
    return None if isinstance(module, FrozenWeight) else getattr(module, "weight", None)


@contextmanager
def cached_effective_weights(model: nn.Module) -> Iterator[None]:
    """Hold the weight that each layer acts with as floats, so that evaluation runs at the base's speed."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    try:
        for layer in adapted:
            layer.cached = layer.effective()
        with dequantized(module for module in model.modules() if getattr(module, "cached", None) is None):
            yield
    finally:
        for layer in adapted:
            layer.cached = None
