"""Write a finished model in the "pack-quantized" format of compressed-tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.api import Grid, ModelReader, Quantized, float_layers, parameters, write_config, write_shards
from sqft.kernels.grids import is_symmetric
from sqft.kernels.packing import pack

VERSION = "0.20.0"
"""The version of compressed-tensors whose form of the format is written."""


def write(model: ModelReader, folder: Path, limit: int | str) -> None:
    """Write `model` into `folder`, in files of at most `limit` bytes."""
    model.copy_settings(folder)
    grids = {layer: model.codes(layer).grid for layer in model.quantized()}
    symmetric = all(map(is_symmetric, grids.values()))
    write_config(folder, quantization_config=settings(grids, symmetric, float_layers(model), model.towers()))
    write_shards(parameters(model, partial(packed, symmetric=symmetric)), folder, limit)


def settings(
    grids: Mapping[str, Grid], symmetric: bool, floats: Sequence[str], towers: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the `quantization_config` of a model whose layers lie on these grids, and `floats` and those inside the
    modules `towers` on none."""
    first = next(iter(grids.values()))
    per_row = first.group_size == -1
    indexed = any(grid.group_index is not None for grid in grids.values())
    if indexed:
        logging.getLogger("sqft").warning(
            "only compressed-tensors before 0.19 reads groups in act-order; gptq's option static_groups avoids them"
        )
    weights = {
        "num_bits": first.bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if per_row else "group",
        "group_size": None if per_row else first.group_size,
        "dynamic": False,
        **({"actorder": "group"} if indexed else {}),
    }
    head = [] if any(name.rpartition(".")[2] == "lm_head" for name in grids) else ["lm_head"]
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [*head, *floats, *(_anywhere([*towers, *head]) if towers else [])],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }


def _anywhere(modules: Sequence[str]) -> list[str]:
    """Return a pattern for each module and the layers in it: programs differ in what comes before its own name."""
    names = sorted({module.rpartition(".")[2] for module in modules})
    return [rf"re:^(.*\.)?{re.escape(name)}(\.|$)" for name in names]


def packed(layer: Quantized, symmetric: bool) -> dict[str, Tensor]:
    """Return a layer's tensors.

    `weight_packed` int32 [out, in · bits / 32] (along a row one stream of bits, lowest first), `weight_scale` float16
    [out, groups], `weight_shape` int64 [2]; unless `symmetric`, `weight_zero_point` int32 [out · bits / 32, groups],
    packed down its columns; where groups are not contiguous, `weight_g_idx` int32 [in].

    Raises:
        ValueError: when inputs or outputs do not fill 32-bit words.
    """
    grid = layer.grid
    tensors = {
        "weight_packed": pack(layer.codes.T, grid.bits).T.contiguous(),
        "weight_scale": grid.scale.half(),
        "weight_shape": torch.tensor(layer.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack(grid.zero, grid.bits)
    if grid.group_index is not None:
        tensors["weight_g_idx"] = grid.group_index.int()
    return tensors
