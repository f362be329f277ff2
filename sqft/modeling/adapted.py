"""A linear layer with an adapter: base, delta and merger become one forward and one backward.

`_merged` is the only place where a merger is called: training's forward, its backward and the merge take
their weights from there, so "merging loses nothing" holds by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqft.contracts import BaseWeight, DeltaModule, Grid, Merger, Quantized
from sqft.errors import StageError
from sqft.kernels import grids
from sqft.modeling.weights import FrozenWeight, PackedLinear, unpacked


def _merged(
    merger: Merger, base: FrozenWeight, B: Tensor, A: Tensor, scale: float, gain: Tensor | None
) -> Iterator[tuple[slice, BaseWeight, Tensor, Tensor, Grid | None]]:
    """Blocks of rows of the base, of scale · B A and of combine of the two [rows, in], and the grid to round that on.

    Float32, with autocast off. The law, in one place: forward, backward and merge all take their weights from here.
    """
    with torch.no_grad(), torch.autocast(B.device.type, enabled=False):
        right = A.float() * scale
        for rows in base.rows():
            block, delta, grid = base.block(rows), B[rows].float() @ right, base.grid(rows)
            if grid and gain is not None:
                grid = grids.stretched(grid, gain[rows])
            yield rows, block, delta, merger.combine(block, delta), grid


def effective_weight(
    merger: Merger,
    base: FrozenWeight,
    B: Tensor,
    A: Tensor,
    scale: float,
    gain: Tensor | None = None,
    less_base: bool = False,
) -> Tensor:
    """W_eff [out, in] = combine(W, scale · B A) in the base's dtype, rounded on the base's grid where it has one
    (paper eq. 1–2 for `sparsepeft`, eq. 3–4 for `qa-sparsepeft`).

    `B` [out, r], `A` [r, in], `gain` [out, groups] what the grid's scales are multiplied by. Computed
    in float32 whatever the dtypes; not differentiable, see `_Effective`. `less_base` gives W_eff − W,
    subtracted before it is rounded to the base's dtype.
    """
    result = torch.empty(base.out_features, base.in_features, dtype=base.dtype, device=B.device)
    with torch.no_grad():
        for rows, block, _, merged, grid in _merged(merger, base, B, A, scale, gain):
            if grid:
                merged = grids.rounded(merged, grid)
            result[rows] = merged - block.weight if less_base else merged
    return result


def effective_codes(
    merger: Merger, base: FrozenWeight, B: Tensor, A: Tensor, scale: float, gain: Tensor | None = None
) -> Quantized:
    """The codes [out, in] of `effective_weight`, with their grid (paper eq. 3).

    Raises:
        StageError: when the base has no grid.
    """
    grid = base.grid()
    if grid is None:
        raise StageError("a float base has no codes")
    codes = torch.empty(base.out_features, base.in_features, dtype=torch.uint8, device=B.device)
    for rows, _, _, merged, part in _merged(merger, base, B, A, scale, gain):
        assert part is not None
        codes[rows] = grids.quantize(merged, part)
    return Quantized(codes, grid if gain is None else grids.stretched(grid, gain))


class _Effective(torch.autograd.Function):
    """y = x W_effᵀ + b, or x (W_eff − W)ᵀ. Keeps x, B and A only; backward makes W_eff again, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        B: Tensor,
        A: Tensor,
        gain: Tensor | None,
        scale: float,
        merger: Merger,
        base: FrozenWeight,
        less_base: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, B, A, gain)
        # The base lives in its module anyway: nothing that it holds is kept for longer by this.
        ctx.scale, ctx.merger, ctx.base, ctx.less_base = scale, merger, base, less_base
        with torch.autocast(x.device.type, enabled=False):
            merged = effective_weight(merger, base, B, A, scale, gain, less_base).to(x.dtype)
            return F.linear(x, merged, bias.to(x.dtype) if bias is not None else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, gain = ctx.saved_tensors
        base: FrozenWeight = ctx.base
        grad = grads[0].reshape(-1, base.out_features)  # [tokens, out]
        inputs = x.reshape(-1, base.in_features)  # [tokens, in]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            shape = (base.out_features, base.in_features)
            wanted = torch.empty(shape, dtype=base.dtype, device=B.device) if ctx.needs_input_grad[0] else None
            # One large matmul: d(loss)/d(W_eff) = dyᵀ x, [out, in].
            grads_of = _gradients(ctx.merger, base, B, A, ctx.scale, gain, grad.T @ inputs, wanted, ctx.less_base)
            grad_x = (grad @ wanted.to(grad.dtype)).reshape(x.shape) if wanted is not None else None
        return grad_x, None, *grads_of, None, None, None, None


class _EffectiveWeight(torch.autograd.Function):
    """W_eff itself, for a model that reads it."""

    @staticmethod
    def forward(
        ctx: Any, B: Tensor, A: Tensor, gain: Tensor | None, scale: float, merger: Merger, base: FrozenWeight
    ) -> Tensor:
        ctx.save_for_backward(B, A, gain)
        ctx.scale, ctx.merger, ctx.base = scale, merger, base
        return effective_weight(merger, base, B, A, scale, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        B, A, gain = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(B.device.type, enabled=False):
            return *_gradients(ctx.merger, ctx.base, B, A, ctx.scale, gain, grads[0]), None, None, None


def _gradients(
    merger: Merger,
    base: FrozenWeight,
    B: Tensor,
    A: Tensor,
    scale: float,
    gain: Tensor | None,
    grad_weight: Tensor,
    wanted: Tensor | None = None,
    less_base: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of B, A and gain from that of W_eff [out, in]; into `wanted` goes W_eff, or W_eff − W."""
    right = A.float() * scale
    grad_B, grad_A = torch.zeros_like(B, dtype=torch.float32), torch.zeros_like(A, dtype=torch.float32)
    grad_gain = torch.zeros_like(gain) if gain is not None else None
    for rows, block, delta, merged, grid in _merged(merger, base, B, A, scale, gain):
        left, through = B[rows].float(), grad_weight[rows].float()
        if grid:
            merged, through, grad_scale = grids.straight_through(merged, grid, through, gain is not None)
            if grad_gain is not None and grad_scale is not None and base.scale is not None:
                grad_gain[rows] = grad_scale * base.scale[rows].float()
        if wanted is not None:
            wanted[rows] = merged - block.weight if less_base else merged
        grad_delta = merger.derivative(block, delta, through)
        grad_B[rows] = grad_delta @ right.T
        grad_A.addmm_(left.T, grad_delta, alpha=scale)
    return grad_B.to(B.dtype), grad_A.to(A.dtype), grad_gain


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
        self.gain: nn.Parameter | None = None
        if learn_scales and base.scale is not None:
            self.gain = nn.Parameter(torch.ones_like(base.scale, dtype=torch.float32))
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
        whole: Tensor = _EffectiveWeight.apply(B, A, self.gain, scale, self.merger, self.base)  # type: ignore[no-untyped-call]
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
        return held if self.gain is None else {**held, "grid.gain": self.gain.detach()}

    def load_trained(self, stored: Mapping[str, Tensor]) -> None:
        """Take what `trained` gave."""
        own = dict(stored)
        if self.gain is not None:
            self.gain.data.copy_(own.pop("grid.gain"))
        cast(nn.Module, self.delta).load_state_dict(own)

    def _factors(self) -> tuple[Tensor, Tensor, float, Tensor | None]:
        if not self.merger.merges:
            raise StageError(f"merger '{self.merger.name}' has no effective weight: its adapter stays beside the base")
        B, A, scale = self.delta.factors(self.rank)
        return B.detach(), A.detach(), scale, self.gain

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
            side = self._through(self.dropout(x), None, B, A, scale, less_base=True)
            return self.base.linear(x, self.bias) + side
        return self._through(x, self.bias, B, A, scale)

    def _through(
        self, x: Tensor, bias: Tensor | None, B: Tensor, A: Tensor, scale: float, less_base: bool = False
    ) -> Tensor:
        y: Tensor = _Effective.apply(x, bias, B, A, self.gain, scale, self.merger, self.base, less_base)  # type: ignore[no-untyped-call]
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


def choose(adapted: Mapping[str, AdaptedLinear], ranks: Mapping[str, int]) -> None:
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
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, each layer holds the weight it acts with as floats, so that evaluation runs at the base's speed."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    try:
        for layer in adapted:
            layer.cached = layer.effective() if layer.merger.merges else None
        with unpacked(module for module in model.modules() if getattr(module, "cached", None) is None):
            yield
    finally:
        for layer in adapted:
            layer.cached = None
