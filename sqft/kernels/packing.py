"""Codes as words of 32 bits, the way GPTQ checkpoints (version 1) store them; and as bytes, row by row, in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sqft.kernels.grids import SMALLEST_SCALE, group_index
from sqft.kernels.words import WORD_BITS, fills_words
from sqft.types import Grid, Quantized

CHUNK_ROWS = 256
"""Rows of codes packed at a time, to bound memory; they fill words at any number of bits."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [n, m] in [0, 2**bits) into int32 words [n · bits / 32, m].

    Down each column the codes are one stream of bits, the lowest first.

    Raises:
        ValueError: when n codes do not fill words.
    """
    if not fills_words(len(codes), bits):
        raise ValueError(f"{len(codes)} codes of {bits} bits do not fill words of {WORD_BITS} bits")
    return torch.cat([_pack(rows, bits) for rows in torch.split(codes, CHUNK_ROWS)])


def _pack(codes: Tensor, bits: int) -> Tensor:
    if WORD_BITS % bits == 0:  # no code spans two words: the same stream, in an eighth of the time
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=codes.device)[:, None]  # [codes, 1]
        in_words = codes.reshape(-1, WORD_BITS // bits, codes.shape[1]).int()  # [words, codes, m]
        return (in_words << shifts).sum(1, dtype=torch.int32)  # [words, m]
    shifts = torch.arange(bits, device=codes.device)[:, None]  # [bits, 1]
    stream = (codes[:, None].long() >> shifts) & 1  # [n, bits, m]
    shifts = torch.arange(WORD_BITS, device=codes.device)[:, None]  # [32, 1]
    words = stream.reshape(-1, WORD_BITS, codes.shape[1]) << shifts  # [words, 32, m]
    return words.sum(1).to(torch.uint32).view(torch.int32)  # [words, m]


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the codes uint8 [words · 32 / bits, m] in int32 words [words, m]: the inverse of `pack`."""
    return torch.cat([_unpack(rows, bits) for rows in torch.split(words, CHUNK_ROWS * bits // WORD_BITS)])


def _unpack(words: Tensor, bits: int) -> Tensor:
    if WORD_BITS % bits == 0:
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)[:, None]  # [codes, 1]
        codes: Tensor = (words[:, None] >> shifts) & (2**bits - 1)  # [words, codes, m]
        return codes.to(torch.uint8).flatten(0, 1)  # [n, m]
    shifts = torch.arange(WORD_BITS, device=words.device)[:, None]  # [32, 1]
    stream = (words[:, None].long() >> shifts) & 1  # [words, 32, m]
    shifts = torch.arange(bits, device=words.device)[:, None]  # [bits, 1]
    return (stream.reshape(-1, bits, words.shape[1]) << shifts).sum(1).to(torch.uint8)  # [n, m]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [n, m] row by row into bytes uint8 [n, m · w / 8], for memory.

    A code takes w bits, the smallest power of two that is at least `bits`. The first bytes' worth of codes are the
    lowest bits of the bytes, the next ones the bits above, and so on: each part is unpacked by one pass over the bytes.
    Any block of rows can be unpacked by itself, which words along a column do not allow.

    Raises:
        ValueError: when m codes do not fill bytes.
    """
    width = _width(bits)
    if codes.shape[1] % (8 // width):
        raise ValueError(f"{codes.shape[1]} codes of {bits} bits do not fill bytes")
    packed, *above = codes.to(torch.uint8).chunk(8 // width, 1)  # [n, bytes] each
    for place, part in enumerate(above, 1):
        packed = packed | part << place * width
    return packed.contiguous()


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Return the codes uint8 [n, m] in bytes [n, m · w / 8]: the inverse of `pack_rows`."""
    width, (rows, size) = _width(bits), packed.shape
    codes = packed.new_empty(rows, 8 // width * size)
    for place in range(8 // width):
        torch.bitwise_right_shift(packed, place * width, out=codes[:, place * size : (place + 1) * size])
    return codes.bitwise_and_(2**bits - 1)


def _width(bits: int) -> int:
    """Return the bits that a code takes in a byte: the smallest power of two that is enough."""
    return 1 << (bits - 1).bit_length()


def to_gptq(quantized: Quantized) -> dict[str, Tensor]:
    """Return a layer's tensors in GPTQ's checkpoint format, version 1.

    `qweight` int32 [in · bits / 32, out], `scales` float16 [groups, out], `g_idx` int32 [in], and `qzeros` int32
    [groups, out · bits / 32], which hold zero − 1. A zero point of 0 is stored with all of its bits set: it does not
    borrow from the next one in the word.

    Raises:
        ValueError: when the codes of all inputs, or of all outputs, do not fill words.
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
    """Return the layer that GPTQ's tensors hold: the inverse of `to_gptq`. Without `g_idx` groups are contiguous.

    A scale of 0, which some programs write for a group of zeros, becomes the smallest scale, and its codes become
    their zero point.

    Raises:
        ValueError: when the shapes of the parts do not fit together, or a group index is out of range.
    """
    for part, tensor in tensors.items():
        if tensor.dim() != (expected := 1 if part == "g_idx" else 2):
            raise ValueError(f"{part} is {list(tensor.shape)}, expected {expected} dimension{'s' * (expected > 1)}")
    codes = unpack(tensors["qweight"], bits).T.contiguous()  # [out, in]
    zero = (unpack(tensors["qzeros"].T.contiguous(), bits).int() + 1) & (2**bits - 1)  # [out, groups]
    outputs, inputs = codes.shape
    size = inputs if group_size == -1 else group_size
    in_order = torch.arange(inputs, dtype=torch.int32, device=codes.device) // size  # [in]
    index = tensors.get("g_idx", in_order).int()
    contiguous = index.equal(in_order)
    groups = (outputs, -(-inputs // size))
    if not groups == tuple(zero.shape) == tuple(tensors["scales"].T.shape):
        raise ValueError(f"expected {groups[1]} scales and zero points for each of {outputs} outputs")
    if index.shape != in_order.shape or int(index.max()) >= groups[1]:
        raise ValueError(f"g_idx does not give each of {inputs} inputs one of {groups[1]} groups")
    if int(index.min()) < 0:
        raise ValueError("g_idx has a group below 0")
    scale = tensors["scales"].T.half().contiguous()  # [out, groups]
    unscaled = scale == 0
    scale = torch.where(unscaled, SMALLEST_SCALE, scale)
    grid = Grid(scale, zero, group_size, bits, None if contiguous else index)
    if unscaled.any():
        at = group_index(grid, inputs)  # [in]
        codes = torch.where(unscaled[:, at], zero[:, at].to(torch.uint8), codes)
    return Quantized(codes, grid)
