"""The frozen weight of a linear layer: floats, or codes kept packed and unpacked on the fly.

Both are read in blocks of rows, and both may carry a grid, on which the weight merged with a delta is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqft.kernels.grids import dequantize
from sqft.kernels.masks import pack_mask, unpack_mask
from sqft.kernels.packing import pack_rows, unpack_rows
from sqft.modeling.compat import int4_layout, int4_linear
from sqft.types import BaseWeight, Grid, Quantized

INT4_ROWS = 4
"""Rows of input up to which torch's int4 kernel is used; with more, unpacking once and a large matmul are faster."""
BLOCK = 1 << 18
"""Elements of a row block: 1 MiB of float32, so that the elementwise passes stay in the cache."""


class FrozenWeight(nn.Module):
    """A weight [out, in] that does not train, used in the precision `dtype`."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    scale: Tensor | None  # float16 [out, groups]
    zero: Tensor | None  # uint8 [out, groups]
    group_index: Tensor | None  # int32 [in]

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, grid: Grid | None) -> None:
        super().__init__()
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype
        self.bits, self.group_size = (grid.bits, grid.group_size) if grid else (0, 0)
        index = grid.group_index if grid else None
        self.register_buffer("scale", grid.scale.half() if grid else None)
        self.register_buffer("zero", grid.zero.to(torch.uint8) if grid else None)
        self.register_buffer("group_index", index.to(torch.int32) if index is not None else None)

    def rows(self) -> Iterator[slice]:
        """Return blocks of rows; they depend on the shape alone, so every use rounds alike."""
        step = max(1, BLOCK // self.in_features)
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))

    def grid(self, rows: slice = slice(None)) -> Grid | None:
        """Return the grid of a block of rows; None when merged weights are not rounded."""
        if self.scale is None or self.zero is None:
            return None
        return Grid(self.scale[rows], self.zero[rows], self.group_size, self.bits, self.group_index)

    def block(self, rows: slice = slice(None)) -> BaseWeight:
        """Return a block of rows as a merger gets it, float32."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the weight [out, in] in `dtype`."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x Wᵀ + b [..., out] of x [..., in]."""
        raise NotImplementedError


class FloatWeight(FrozenWeight):
    """Floats. With `sparse`, the mask keeps what is not zero; otherwise it keeps all weights."""

    def __init__(self, weight: Tensor, sparse: bool, grid: Grid | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], weight.dtype, grid)
        self.sparse = sparse
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)

    def block(self, rows: slice = slice(None)) -> BaseWeight:
        weight = self.weight.detach()[rows].float()
        return BaseWeight(weight, weight != 0 if self.sparse else None)

    def dense(self) -> Tensor:
        return self.weight.detach()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


class PackedWeight(FrozenWeight):
    """Codes on a grid, packed: at 4 bits and groups of 128, 0.52 bytes a weight, and 0.65 with a mask.

    The base's mask cannot be read from the codes: a kept weight may have been rounded to zero. With residuals, a byte
    more for each weight, it stands for the floats that were rounded to the codes.
    """

    packed: Tensor  # uint8 [out, in · w / 8]
    mask: Tensor | None  # uint8 [out, ⌈in / 8⌉], one bit a weight; every row starts at a new byte
    residual: Tensor | None  # int8 [out, in]

    def __init__(self, quantized: Quantized, mask: Tensor | None, dtype: torch.dtype) -> None:
        out, inputs = quantized.codes.shape
        super().__init__(out, inputs, dtype, quantized.grid)
        self.register_buffer("packed", pack_rows(quantized.codes, self.bits))
        self.register_buffer("mask", None)
        self.register_buffer("residual", None)
        self.held: Tensor | None = None
        self.kernel: tuple[Tensor, Tensor] | None = None
        if mask is not None:
            self.set_mask(mask)

    def set_mask(self, mask: Tensor) -> None:
        """Set which weights the base keeps, bool [out, in]."""
        padded = F.pad(mask, (0, -self.in_features % 8))
        self.mask = pack_mask(padded).reshape(self.out_features, -1)

    def set_residual(self, residual: Tensor) -> None:
        """Set how far the weight lies from its codes' values, int8 [out, in]; see `sqft.kernels.grids.residual`."""
        self.residual, self.kernel = residual, None

    def prepare_int4_kernel(self) -> bool:
        """Lay the codes out a second time for torch's int4 kernel on CPUs, for decoding in bfloat16.

        Returns whether the kernel can take this weight, which it cannot with residuals.
        It takes 4 bits, contiguous groups of 32 to 256 and outputs in sixteens, and rounds scales to bfloat16.
        """
        grid = self.grid()
        fits = self.bits == 4 and self.group_size in (32, 64, 128, 256) and self.out_features % 16 == 0
        fits = fits and self.in_features % self.group_size == 0
        fits = fits and self.residual is None and self.packed.device.type == "cpu"
        if grid is None or not fits or grid.group_index is not None:
            return False
        scale = grid.scale.float()
        # The kernel's value of a code is (q − 8) · s + z.
        pairs = torch.stack([scale, scale * (8 - grid.zero.float())], -1).transpose(0, 1)  # [groups, out, 2]
        laid_out = int4_layout(self.codes().codes.int())
        self.kernel = (laid_out, pairs.contiguous().bfloat16())
        return True

    def codes(self, rows: slice = slice(None)) -> Quantized:
        """Return the codes of a block of rows, with their grid."""
        grid = self.grid(rows)
        assert grid is not None
        return Quantized(unpack_rows(self.packed[rows], self.bits)[:, : self.in_features], grid)

    def value(self, rows: slice = slice(None)) -> Tensor:
        """Return a block of rows of the weight, float32: the codes' values, or with residuals the floats before."""
        return dequantize(self.codes(rows), None if self.residual is None else self.residual[rows])

    def block(self, rows: slice = slice(None)) -> BaseWeight:
        weight = self.value(rows)
        if self.mask is None:
            return BaseWeight(weight, None)
        bits = self.mask[rows]
        mask = unpack_mask(bits.reshape(-1), (len(bits), 8 * bits.shape[1]))[:, : self.in_features]
        return BaseWeight(weight, mask)

    def dense(self) -> Tensor:
        if self.held is not None:
            return self.held
        result = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.packed.device)
        for rows in self.rows():
            result[rows] = self.value(rows)
        return result

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        decoding = x.numel() <= INT4_ROWS * self.in_features and x.dtype == torch.bfloat16
        if self.kernel is not None and decoding and not torch.is_grad_enabled():
            codes, pairs = self.kernel
            rows = x.reshape(-1, self.in_features)  # [tokens, in]
            product = int4_linear(rows, codes, self.group_size, pairs).reshape(*x.shape[:-1], self.out_features)
            return product if bias is None else product + bias.to(product.dtype)
        y: Tensor = _Unpacked.apply(x, bias, self)  # type: ignore[no-untyped-call]
        return y


class _Unpacked(torch.autograd.Function):
    """y = x Wᵀ + b over a packed weight. Keeps nothing; backward unpacks the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
        ctx.weight = weight  # lives in its module anyway
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.dense().to(x.dtype), bias.to(x.dtype) if bias is not None else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return grads[0] @ ctx.weight.dense().to(grads[0].dtype), None, None


class PackedLinear(nn.Module):
    """A linear layer [in] → [out] of codes, which does not train."""

    def __init__(self, base: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.bias = base, bias

    @property
    def weight(self) -> Tensor:
        """The value of the codes, [out, in], for a model that reads it."""
        return self.base.dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.base.linear(x, self.bias)


@contextmanager
def dequantized(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the values of these layers' packed weights beside the codes: evaluation is as fast as with floats."""
    bases = [base for layer in layers if isinstance(base := getattr(layer, "base", None), PackedWeight)]
    try:
        for base in bases:
            base.held = base.dense()
        yield
    finally:
        for base in bases:
            base.held = None
