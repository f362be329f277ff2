"""Codes as GGUF's blocks of 32 weights, bit by bit (ggml's Q4_0, Q5_0 and Q8_0: a scale in float16, then codes).

A group's scale is repeated in each of its blocks, and codes are shifted so that the zero point becomes the type's own:
value = scale · (code − zero) either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from sqft.api import Grid, Quantized
from sqft.kernels.grids import is_symmetric

BLOCK = 32
"""Weights of a block, all in one row."""
ZERO = {GGMLQuantizationType.Q4_0: 8, GGMLQuantizationType.Q5_0: 16, GGMLQuantizationType.Q8_0: 128}
"""The code that stands for 0, where the smallest code is counted as 0."""


def refusal_of_grid(grid: Mapping[str, Any]) -> str | None:
    """Return why no type of GGUF holds codes on grids with these settings of a quantizer; None when one does.

    Args:
        grid: `bits`, `group_size`, `symmetric` and whether groups are in `act_order`, where they are known.
    """
    if grid.get("act_order"):
        return "groups in act-order have no place in GGUF; add static_groups to act_order, or use reorder_groups"
    if (size := grid.get("group_size", -1)) != -1 and size % BLOCK:
        return f"GGUF's groups are of {BLOCK} inputs, and groups of {size} are no multiple of that"
    if grid.get("bits") == 8 and grid.get("symmetric") is False:
        return "GGUF has no type for 8 bits with zero points; set symmetric to true, or take 4 bits"
    return None


def type_of(grid: Grid, inputs: int) -> GGMLQuantizationType:
    """Return the type of GGUF that holds every code on a grid.

    Raises:
        ValueError: saying why none does.
    """
    if grid.bits not in (2, 3, 4, 8):
        raise ValueError(f"GGUF has no type for codes of {grid.bits} bits that keeps their values")
    symmetric = is_symmetric(grid)
    settings = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": symmetric}
    if why := refusal_of_grid(settings | {"act_order": grid.group_index is not None and grid.group_size != -1}):
        raise ValueError(why)
    if inputs % BLOCK or (grid.group_size != -1 and inputs % grid.group_size):
        raise ValueError(f"GGUF's groups are of {BLOCK} inputs, and rows of {inputs} do not fill them")
    if grid.bits == 8:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.Q5_0 if grid.bits == 4 and not symmetric else GGMLQuantizationType.Q4_0


def blocks(layer: Quantized) -> NDArray[np.uint8]:
    """Return the bytes [out, in / 32 · size of a block] of a layer's codes, in the type that `type_of` names.

    Raises:
        ValueError: when no type of GGUF holds them.
    """
    out, inputs = layer.codes.shape
    grid, kind = layer.grid, type_of(layer.grid, inputs)
    size = inputs if grid.group_size == -1 else grid.group_size
    codes = layer.codes.numpy().astype(np.int16).reshape(out, -1, size)
    codes += ZERO[kind] - grid.zero.numpy().astype(np.int16)[..., None]
    codes = codes.reshape(out, -1, BLOCK)  # [out, blocks, 32], the smallest code being 0
    scale = grid.scale.half().numpy().repeat(size // BLOCK, 1)[..., None]  # [out, blocks, 1]
    parts = [np.ascontiguousarray(scale).view(np.uint8)]
    if kind == GGMLQuantizationType.Q8_0:
        parts.append((codes - ZERO[kind]).astype(np.int8).view(np.uint8))
    else:
        first, second = np.split(codes & 15, 2, -1)  # the two halves of a block lie side by side in a byte
        if kind == GGMLQuantizationType.Q5_0:  # the fifth bit of each code, the first the lowest
            parts.append(np.packbits((codes >> 4).astype(np.uint8), -1, "little"))
        parts.append((first | second << 4).astype(np.uint8))
    return np.concatenate(parts, -1).reshape(out, -1)
