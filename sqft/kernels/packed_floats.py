"""Floats of four and eight bits with scales, as ordinary floats.

Sources: OCP Microscaling Formats (MX) Specification 1.0 for MXFP4; float8 with a scale for each block as DeepSeek-V3's
report has it (§3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of a 4-bit float without its sign: two bits of exponent, one of mantissa."""

EXPONENT_OF_ONE = 127
"""The byte that stands for a scale of 1 (E8M0: an exponent of two and nothing else)."""


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values of MXFP4 as float32, [..., rows, 32 · n].

    Args:
        blocks: bytes [..., rows, n, 16]; each holds two values, the first in its lower half.
        scales: bytes [..., rows, n], one for 32 values.
    """
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=blocks.device)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()  # [..., rows, n, 32]
    return (values[codes] * exponents(scales)[..., None]).flatten(-2)


def exponents(scales: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents of two."""
    if scales.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.int() - EXPONENT_OF_ONE)
    return scales.float()


def from_float8(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Return the values of float8 codes as float32, [..., out, in].

    Args:
        codes: [..., out, in], of one of torch's float8 types.
        scales: one for each block, [..., ⌈out / rows⌉, ⌈in / columns⌉]; for each row, [..., out] or [..., out, 1]; or
            one for all.
        block: rows and columns that share a scale; None when there are no blocks.
    """
    out, inputs = codes.shape[-2:]
    factor, values = exponents(scales), codes.float()
    if factor.numel() == 1:
        return values * factor.reshape(())
    if block and factor.shape[-2:] == (-(-out // block[0]), -(-inputs // block[1])):
        factor = factor.repeat_interleave(block[0], -2)[..., :out, :]
        factor = factor.repeat_interleave(block[1], -1)[..., :inputs]  # the last block may be smaller
    elif factor.dim() < codes.dim():
        factor = factor[..., None]
    return values * factor
