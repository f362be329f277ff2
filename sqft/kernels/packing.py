"""Codes as words of 32 bits, the way GPTQ checkpoints (version 1) store them; and as bytes, row by row, in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.kernels.grids import SMALLEST, group_index
from sqft.types import Grid, Quantized

WORD = 32


ROWS = 256
"""Rows of codes packed at a time, a whole number of words at any number of bits."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, m] in [0, 2**bits) as int32 [n · bits / 32, m]: along a column one stream of bits, lowest first.

    Raises:
        ValueError: when n codes do not fill whole words.
    """
    if len(codes) * bits % WORD:
        raise ValueError(f"{len(codes)} codes of {bits} bits do not fill words of {WORD} bits")
    return torch.cat([_pack(rows, bits) for rows in torch.split(codes, ROWS)])


def _pack(codes: Tensor, bits: int) -> Tensor:
    if WORD % bits == 0:  # no code is cut by a word's end: the same stream, in an eighth of the time
        places = torch.arange(0, WORD, bits, dtype=torch.int32, device=codes.device)[:, None]
        return (codes.reshape(-1, WORD // bits, codes.shape[1]).int() << places).sum(1, dtype=torch.int32)
    shifts = torch.arange(bits, device=codes.device)
    stream = (codes[:, None].long() >> shifts[:, None]) & 1  # [n, bits, m]
    words = stream.reshape(-1, WORD, codes.shape[1]) << torch.arange(WORD, device=codes.device)[:, None]
    return words.sum(1).to(torch.uint32).view(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 codes [words · 32 / bits, m]."""
    return torch.cat([_unpack(rows, bits) for rows in torch.split(words, ROWS * bits // WORD)])


def _unpack(words: Tensor, bits: int) -> Tensor:
    if WORD % bits == 0:
        places = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)[:, None]
        codes: Tensor = (words[:, None] >> places) & (2**bits - 1)
        return codes.to(torch.uint8).flatten(0, 1)
    stream = (words[:, None].long() >> torch.arange(WORD, device=words.device)[:, None]) & 1
    parts = stream.reshape(-1, bits, words.shape[1]) << torch.arange(bits, device=words.device)[:, None]
    return parts.sum(1).to(torch.uint8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, m] as uint8 [n, m · w / 8] for memory: w bits each, lowest first, w the power of two from `bits` on.

    Any block of rows is unpacked by itself, which words along a column do not allow.

    Raises:
        ValueError: when m codes do not fill whole bytes.
    """
    shifts = _shifts(bits, codes.device)
    if codes.shape[1] % len(shifts):
        raise ValueError(f"{codes.shape[1]} codes of {bits} bits do not fill bytes")
    parts = codes.to(torch.uint8).reshape(len(codes), -1, len(shifts)) << shifts
    return parts.sum(-1, dtype=torch.uint8)


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 codes [n, m]."""
    shifts = _shifts(bits, packed.device)
    codes: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(1)


def _shifts(bits: int, device: torch.device) -> Tensor:
    width = 1 << (bits - 1).bit_length()
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


def to_gptq(quantized: Quantized) -> dict[str, Tensor]:
    """A layer's tensors in GPTQ's checkpoint format, version 1.

    `qweight` int32 [in · bits / 32, out], `scales` float16 [groups, out], `g_idx` int32 [in], and `qzeros` int32
    [groups, out · bits / 32], which hold zero − 1. A zero point of 0 is stored as all ones of its own bits: it
    borrows nothing from the next one in the word.

    Raises:
        ValueError: when inputs or outputs do not fill whole words.
    """
    grid, inputs = quantized.grid, quantized.codes.shape[1]
    stored = (grid.zero.int() - 1) & (2**grid.bits - 1)  # [out, groups]
    return {
        "qweight": pack(quantized.codes.T, grid.bits).contiguous(),
        "qzeros": pack(stored, grid.bits).T.contiguous(),
        "scales": grid.scale.half().T.contiguous(),
        "g_idx": group_index(grid, inputs).int().cpu(),
    }


def from_gptq(tensors: dict[str, Tensor], bits: int, group_size: int) -> Quantized:
    """The inverse of `to_gptq`; without `g_idx` the groups are contiguous.

    A scale of 0, which some programs write for a group of zeros, becomes the smallest there is, and its codes 0's.

    Raises:
        ValueError: when the parts do not fit one another.
    """
    for part, tensor in tensors.items():
        if tensor.dim() != (expected := 1 if part == "g_idx" else 2):
            raise ValueError(f"{part} is {list(tensor.shape)}, expected {expected} dimension{'s' * (expected > 1)}")
    codes = unpack(tensors["qweight"], bits).T.contiguous()
    zero = (unpack(tensors["qzeros"].T.contiguous(), bits).int() + 1) & (2**bits - 1)
    size = codes.shape[1] if group_size == -1 else group_size
    in_order = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) // size
    index = tensors.get("g_idx", in_order).int()
    contiguous = index.equal(in_order)
    groups = (codes.shape[0], -(-codes.shape[1] // size))
    if not groups == tuple(zero.shape) == tuple(tensors["scales"].T.shape):
        raise ValueError(f"there are not {groups[1]} scales and zero points for each of {groups[0]} outputs")
    if index.shape != in_order.shape or int(index.max()) >= groups[1]:
        raise ValueError(f"not every one of {codes.shape[1]} inputs has a group, of {groups[1]}")
    if int(index.min()) < 0:
        raise ValueError("a group index is below 0")
    scale = tensors["scales"].T.half().contiguous()
    nothing = scale == 0
    scale = torch.where(nothing, SMALLEST, scale)
    grid = Grid(scale, zero, group_size, bits, None if contiguous else index)
    if nothing.any():
        at = group_index(grid, codes.shape[1])
        codes = torch.where(nothing[:, at], zero[:, at].to(torch.uint8), codes)
    return Quantized(codes, grid)
