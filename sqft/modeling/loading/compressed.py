"""Layers as compressed-tensors stores them."""

from __future__ import annotations

import torch

from sqft.kernels.packing import unpack
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.types import Grid, Quantized


def read_compressed_layer(reader: FolderReader, name: str) -> Quantized:
    """Read a layer of "pack-quantized", where codes and zero points are stored with half their range added.

    Raises:
        ValueError: when the shapes of its tensors do not fit one another.
    """
    stored = set(reader.names())
    words, scale = reader.tensor(f"{name}.weight_packed"), reader.tensor(f"{name}.weight_scale")
    if wrong := [list(tensor.shape) for tensor in (words, scale) if tensor.dim() != 2]:
        raise ValueError(f"codes or scales are {wrong[0]}, expected 2 dimensions")
    out, inputs = map(int, reader.tensor(f"{name}.weight_shape"))
    bits, groups = words.shape[1] * 32 // inputs, scale.shape[1]
    codes = unpack(words.T.contiguous(), bits).T[:, :inputs]
    zero = torch.full((out, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if f"{name}.weight_zero_point" in stored:
        points = reader.tensor(f"{name}.weight_zero_point")
        packed = points.dtype == torch.int32 and points.shape[0] != out
        zero = unpack(points, bits)[:out] if packed else (points.int() + 2 ** (bits - 1)).to(torch.uint8)
    if codes.shape != (out, inputs) or zero.shape != (out, groups):
        raise ValueError(f"expected {groups} zero points and {inputs} codes for each of {out} outputs")
    index = reader.tensor(f"{name}.weight_g_idx") if f"{name}.weight_g_idx" in stored else None
    size = -1 if groups == 1 else inputs // groups
    return Quantized(codes, Grid(scale, zero, size, bits, index))
