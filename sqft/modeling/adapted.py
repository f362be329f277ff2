"""A linear layer with an adapter: base, delta and merger become one forward and one backward.

`effective_weight` is the only place where the weight that is trained through is computed; the merge
calls it too, so "merging loses nothing" holds by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqft.contracts import BaseWeight, DeltaModule, Merger
from sqft.errors import StageError

BLOCK = 1 << 18
"""Elements of a row block: 1 MiB of float32, so that the elementwise passes stay in the cache."""


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Row blocks of a weight [out, in]; they depend on its shape alone, so every use rounds alike."""
    rows = max(1, BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def _base(weight: Tensor, sparse: bool, rows: slice) -> BaseWeight:
    block = weight[rows].float()
    return BaseWeight(block, block != 0 if sparse else None)


def effective_weight(
    merger: Merger, weight: Tensor, sparse: bool, B: Tensor, A: Tensor, scale: float, less_base: bool = False
) -> Tensor:
    """W_eff [out, in] = combine(W, scale · B A) in the weight's dtype (paper eq. 1–2 for `sparsepeft`).

    `weight` [out, in], `B` [out, r], `A` [r, in]. Computed in float32 with autocast off, whatever the
    dtypes; not differentiable, see `_Effective`. `less_base` gives W_eff − W, subtracted before it is
    rounded to the weight's dtype.
    """
    result = torch.empty_like(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        right = A.float() * scale
        for rows in _blocks(weight):
            base = _base(weight, sparse, rows)
            block = merger.combine(base, B[rows].float() @ right)
            result[rows] = block - base.weight if less_base else block
    return result


class _Effective(torch.autograd.Function):
    """y = x W_effᵀ + b, or x (W_eff − W)ᵀ. Keeps x, W, A and B only; backward makes W_eff again, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        B: Tensor,
        A: Tensor,
        scale: float,
        merger: Merger,
        sparse: bool,
        less_base: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, B, A)
        ctx.scale, ctx.merger, ctx.sparse, ctx.less_base = scale, merger, sparse, less_base
        with torch.autocast(x.device.type, enabled=False):
            merged = effective_weight(merger, weight, sparse, B, A, scale, less_base).to(x.dtype)
            return F.linear(x, merged, bias.to(x.dtype) if bias is not None else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, B, A = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])  # [tokens, out]
        inputs = x.reshape(-1, weight.shape[1])  # [tokens, in]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            right = A.float() * ctx.scale
            grad_B, grad_A = torch.zeros_like(B, dtype=torch.float32), torch.zeros_like(A, dtype=torch.float32)
            merged = torch.empty_like(weight) if ctx.needs_input_grad[0] else None
            # One large matmul: d(loss)/d(W_eff) = dyᵀ x, [out, in].
            grad_weight = grad.T @ inputs
            for rows in _blocks(weight):
                base, left = _base(weight, ctx.sparse, rows), B[rows].float()
                delta = left @ right
                if merged is not None:
                    block = ctx.merger.combine(base, delta)
                    merged[rows] = block - base.weight if ctx.less_base else block
                grad_delta = ctx.merger.derivative(base, delta, grad_weight[rows].float())
                grad_B[rows] = grad_delta @ right.T
                grad_A.addmm_(left.T, grad_delta, alpha=ctx.scale)
            del grad_weight
            grad_x = (grad @ merged.to(grad.dtype)).reshape(x.shape) if merged is not None else None
        return grad_x, None, None, grad_B.to(B.dtype), grad_A.to(A.dtype), None, None, None, None


class AdaptedLinear(nn.Module):
    """A frozen linear layer [in] → [out] with a trainable low-rank delta.

    `rank` is the rank in use, at first the largest. A merger that merges runs through the effective
    weight; one that does not takes the ordinary two paths, W x + scale · B A x. Dropout on the
    adapter's input is no function of a weight, so with it a merger trains through two paths as well,
    W x + (W_eff − W) dropout(x), at the cost of both.
    """

    def __init__(
        self, linear: nn.Linear, delta: DeltaModule, merger: Merger, sparse: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.delta, self.merger, self.sparse = delta, merger, sparse
        self.dropout = nn.Dropout(dropout)
        self.rank = delta.rank
        self.cached: Tensor | None = None

    def base(self) -> BaseWeight:
        """The frozen weight and its mask [out, in], as a merger sees them."""
        return _base(self.weight.detach(), self.sparse, slice(None))

    def effective(self) -> Tensor:
        """The effective weight [out, in] at the current rank, in the base's dtype.

        Raises:
            StageError: when the merger keeps the adapter beside the base.
        """
        if not self.merger.merges:
            raise StageError(f"merger '{self.merger.name}' has no effective weight: its adapter stays beside the base")
        B, A, scale = self.delta.factors(self.rank)
        return effective_weight(self.merger, self.weight, self.sparse, B.detach(), A.detach(), scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is not None:
            return F.linear(x, self.cached, self.bias)
        B, A, scale = self.delta.factors(self.rank)
        if not self.merger.merges:
            side = F.linear(self.dropout(x), A.to(x.dtype))
            return F.linear(x, self.weight, self.bias) + F.linear(side, B.to(x.dtype)) * scale
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.training and self.dropout.p > 0:
            # Not the difference of two outputs: in bfloat16 that would lose a small delta's digits.
            side = self._through(self.dropout(x), None, B, A, scale, less_base=True)
            return F.linear(x, self.weight, self.bias) + side
        return self._through(x, self.bias, B, A, scale)

    def _through(
        self, x: Tensor, bias: Tensor | None, B: Tensor, A: Tensor, scale: float, less_base: bool = False
    ) -> Tensor:
        y: Tensor = _Effective.apply(x, self.weight, bias, B, A, scale, self.merger, self.sparse, less_base)  # type: ignore[no-untyped-call]
        return y


def attach(
    model: nn.Module, deltas: Mapping[str, DeltaModule], merger: Merger, sparse: bool, dropout: float = 0.0
) -> dict[str, AdaptedLinear]:
    """Freeze the model and put an `AdaptedLinear` in place of each named linear layer."""
    model.requires_grad_(False)
    adapted = {}
    for name, delta in deltas.items():
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        adapted[name] = AdaptedLinear(linear, delta, merger, sparse, dropout)
        setattr(model.get_submodule(parent), last, adapted[name])
    return adapted


def choose(adapted: Mapping[str, AdaptedLinear], ranks: Mapping[str, int]) -> None:
    """Set the rank of every adapted layer."""
    for name, layer in adapted.items():
        layer.rank = ranks[name]


@contextmanager
def frozen(adapted: Mapping[str, AdaptedLinear]) -> Iterator[None]:
    """Inside, each layer that merges holds its effective weight, so that evaluation runs at the base's speed."""
    try:
        for layer in adapted.values():
            layer.cached = layer.effective() if layer.merger.merges else None
        yield
    finally:
        for layer in adapted.values():
            layer.cached = None
