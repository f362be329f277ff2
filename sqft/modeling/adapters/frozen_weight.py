"""The frozen weight of a linear layer: floats, or without their zeros, or codes. What is packed is unpacked on the fly.

All are read in blocks of rows, and may carry a grid, on which the weight merged with a delta is rounded.
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


class UnpackedOnTheFly(FrozenWeight):
    """A weight that is smaller in memory than as floats, and that each use unpacks."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, grid: Grid | None) -> None:
        super().__init__(out_features, in_features, dtype, grid)
        self.held: Tensor | None = None

    def value(self, rows: slice = slice(None)) -> Tensor:
        """Return a block of rows of the weight."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        if self.held is not None:
            return self.held
        device = next(self.buffers()).device
        result = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=device)
        for rows in self.rows():
            result[rows] = self.value(rows)
        return result

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _Unpacked.apply(in_autocast(x), bias, self)  # type: ignore[no-untyped-call]
        return y


class SparseWeight(UnpackedOnTheFly):
    """Floats without their zeros: those that are there, and a bit for each weight that says whether it is. Of a weight
    that is half zeros, in 16 bits, 9 bits a weight. It unpacks to the same floats, and −0 to 0.

    As in `FloatWeight`, with `sparse` the mask keeps what is not zero.
    """

    kept: Tensor  # uint8 [out, ⌈in / 8⌉], one bit a weight; every row starts at a new byte
    values: Tensor  # [those that are kept], row after row

    def __init__(self, weight: Tensor, sparse: bool) -> None:
        super().__init__(weight.shape[0], weight.shape[1], weight.dtype, None)
        self.sparse = sparse
        kept = weight.detach() != 0
        self.starts = [0, *kept.sum(1).cumsum(0).tolist()]
        """Where each row's values start."""
        self.register_buffer("kept", pack_rows_of_bits(kept))
        self.register_buffer("values", weight.detach()[kept])

    @staticmethod
    def saves_memory(weight: Tensor) -> bool:
        """Return whether enough of a weight [out, in] is zero for it to be smaller so."""
        out, inputs = weight.shape
        return int((weight == 0).sum()) * weight.element_size() > out * -(-inputs // 8)

    def value(self, rows: slice = slice(None)) -> Tensor:
        """Return a block of rows of the weight, in its own precision."""
        first, last, _ = rows.indices(self.out_features)
        kept = unpack_rows_of_bits(self.kept[rows], self.in_features)
        values = self.values[self.starts[first] : self.starts[last]]
        return values.new_zeros(last - first, self.in_features).masked_scatter_(kept, values)

    def block(self, rows: slice = slice(None)) -> BaseWeight:
        weight = self.value(rows).float()
        return BaseWeight(weight, weight != 0 if self.sparse else None)


def pack_rows_of_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask [out, in] into uint8 [out, ⌈in / 8⌉]; every row starts at a new byte."""
    return pack_mask(F.pad(mask, (0, -mask.shape[1] % 8))).reshape(len(mask), -1)


def unpack_rows_of_bits(packed: Tensor, in_features: int) -> Tensor:
    """Return the bool mask [out, in] in bytes: the inverse of `pack_rows_of_bits`."""
    return unpack_mask(packed.reshape(-1), (len(packed), 8 * packed.shape[1]))[:, :in_features]


class PackedWeight(UnpackedOnTheFly):
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
        self.kernel: tuple[Tensor, Tensor] | None = None
        if mask is not None:
            self.set_mask(mask)

    def set_mask(self, mask: Tensor) -> None:
        """Set which weights the base keeps, bool [out, in]."""
        self.mask = pack_rows_of_bits(mask)

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
        return BaseWeight(weight, unpack_rows_of_bits(self.mask[rows], self.in_features))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = in_autocast(x)
        decoding = x.numel() <= INT4_ROWS * self.in_features and x.dtype == torch.bfloat16
        if self.kernel is not None and decoding and not torch.is_grad_enabled():
            codes, pairs = self.kernel
            rows = x.reshape(-1, self.in_features)  # [tokens, in]
            product = int4_linear(rows, codes, self.group_size, pairs).reshape(*x.shape[:-1], self.out_features)
            return product if bias is None else product + bias.to(product.dtype)
        return super().linear(x, bias)


def in_autocast(x: Tensor) -> Tensor:
    """Return an input in the precision of autocast, where that is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Unpacked(torch.autograd.Function):
    """y = x Wᵀ + b over a weight that is unpacked. Keeps nothing; backward unpacks the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: UnpackedOnTheFly) -> Tensor:
        ctx.weight = weight  # lives in its module anyway
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.dense().to(x.dtype), bias.to(x.dtype) if bias is not None else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):
            return grads[0] @ ctx.weight.dense().to(grads[0].dtype), None, None


class PackedLinear(nn.Module):
    """A linear layer [in] → [out] of codes, or of floats without their zeros, which does not train."""

    def __init__(self, base: UnpackedOnTheFly, bias: Tensor | None, stored_transposed: bool = False) -> None:
        super().__init__()
        self.stored_transposed = stored_transposed
        """Whether transformers stores the layer's weight as [in, out]."""
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.bias = base, bias

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], for a model that reads it."""
        return self.base.dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.base.linear(x, self.bias)


@contextmanager
def dequantized(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the values of these layers' packed weights beside them: evaluation is as fast as with floats."""
    bases = [base for layer in layers if isinstance(base := getattr(layer, "base", None), UnpackedOnTheFly)]
    try:
        for base in bases:
            base.held = base.dense()
        yield
    finally:
        for base in bases:
            base.held = None
