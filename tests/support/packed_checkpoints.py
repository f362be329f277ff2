"""Checkpoints in MXFP4 and FP8, packed here by the formats' own definitions, with the floats that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The sixteen values of a 4-bit float: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats)."""

MX_BLOCK = 32
"""Values that share a scale in MXFP4."""


def to_mxfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Pack [experts, in, out] as gpt-oss stores it; return blocks [experts, out, in / 32, 16] and scales
    [experts, out, in / 32], and the floats they stand for.

    Each byte holds two values, the first in its lower half. A scale is an exponent of two, with 127 for one.
    """
    values = weight.mT.float().unflatten(-1, (-1, MX_BLOCK))  # [experts, out, blocks, 32]
    exponent = torch.floor(torch.log2(values.abs().amax(-1).clamp(min=2**-100))) - 2
    codes = (values[..., None] / torch.exp2(exponent)[..., None, None] - E2M1).abs().argmin(-1)
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    floats = (E2M1[codes] * torch.exp2(exponent)[..., None]).flatten(-2).mT.contiguous()
    return {"blocks": blocks, "scales": (exponent + 127).to(torch.uint8)}, floats


def to_fp8(weight: Tensor, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """Pack [out, in] as DeepSeek and Qwen store it: float8 of 4 bits of exponent, with a scale for each block; return
    both, and the floats they stand for. Blocks at the border may be smaller."""
    out, inputs = weight.shape
    blocks = -(-out // rows), -(-inputs // columns)
    scale = torch.empty(blocks)
    codes, floats = torch.empty(out, inputs, dtype=torch.float8_e4m3fn), torch.empty(out, inputs)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
            floats[place] = codes[place].float() * scale[i, j]
    return {"weight": codes, "weight_scale_inv": scale}, floats


def pack_folder(folder: Path, method: str, block: tuple[int, int] = (128, 128)) -> dict[str, Tensor]:
    """Pack the weights of a model folder in place, and return the floats that all its tensors stand for."""
    stored, floats, config = load_file(folder / "model.safetensors"), dict[str, Tensor](), read(folder)
    packed: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        owner, _, last = name.rpartition(".")
        if method == "mxfp4" and last in ("gate_up_proj", "down_proj"):
            parts, floats[name] = to_mxfp4(tensor)
            packed |= {f"{name}_{part}": one for part, one in parts.items()}
        elif method == "fp8" and last == "weight" and tensor.dim() == 2 and ".layers." in name and "norm" not in owner:
            if owner.endswith((".gate", "router")):
                packed[name] = floats[name] = tensor
                continue
            parts, floats[name] = to_fp8(tensor.float(), *block)
            packed |= {f"{owner}.{part}": one for part, one in parts.items()}
        else:
            packed[name] = floats[name] = tensor
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {"quant_method": method}
    if method == "fp8":
        settings |= {"fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return floats


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content
