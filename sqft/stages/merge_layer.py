"""Merge one layer, and count what that changes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sqft.kernels import grids
from sqft.modeling.adapters.adapted_linear import MergedLinear
from sqft.modeling.adapters.frozen_weight import FrozenWeight, PackedWeight
from sqft.stages.inputs import Report
from sqft.types import Quantized

log = logging.getLogger("sqft")

UNCHANGED = (
    "training changed no code, so that the merged model is the one before training; train for more steps, with a "
    'larger finetune.learning_rate, or with finetune.base "floats" or "compensated", where small deltas move codes'
)


class Merged(NamedTuple):
    """A layer that was merged."""

    weight: Tensor  # [out, in]
    codes: Quantized | None
    """Those that the weight is the value of, where the base has a grid."""
    lost: int
    """Zeros of the base that are not zero."""
    counts: dict[str, int]
    """What to report."""


def merge_layer(layer: MergedLinear, before: Quantized | None, device: str) -> Merged:
    """Merge a layer, and count what that changes.

    Args:
        layer: on the CPU, where the merge is made, at the ranks that were chosen.
        before: its codes as the base has them, if it has some.
        device: where it was trained: sums in another order may round to other codes there.
    """
    base = layer.base
    codes = layer.codes() if base.grid() is not None else None
    weight = grids.dequantize(codes).to(base.dtype) if codes else layer.effective()
    kept = lost = 0
    for rows in base.rows():  # whole masks would fill the memory
        mask = kept_by_base(base, rows)
        kept += int(mask.count_nonzero())
        lost += int(((weight[rows] != 0) & ~mask).count_nonzero())
    counts = {
        "zeros_before": weight.numel() - kept,
        "zeros_after": weight.numel() - int(weight.count_nonzero()),
        "weights": weight.numel(),
    }
    if codes and before:
        counts["codes_changed"] = _count_different(codes, codes_before_training(base))
        counts["codes_unlike_base"] = _count_different(codes, before)
        if device != "cpu":
            counts["codes_unlike_on_device"] = count_unlike(layer, codes, device)
    return Merged(weight, codes, lost, counts)


def report_of(layers: Iterable[Mapping[str, int]], bits: int | None = None) -> Report:
    """Return what to report of merged layers, given the counts of each, and the bits of the base's codes; warn where
    training changed none of these."""
    layers, total = list(layers), Counter[str]()
    for counts in layers:
        total.update(counts)
    report: Report = {"layers": len(layers), **total, "sparsity": total["zeros_after"] / total["weights"]}
    if bits is None:
        return report
    if not total["codes_changed"]:
        log.warning("%s", UNCHANGED)
        report["warning"] = UNCHANGED
    return {**report, "bits": bits, **{key: total[key] for key in ("codes_changed", "codes_unlike_base")}}


def kept_by_base(base: FrozenWeight, rows: slice = slice(None)) -> Tensor:
    """Return a bool tensor [rows, in], true where a base keeps its weight; codes without a mask keep all of them."""
    block = base.block(rows)
    if block.mask is not None:
        return block.mask
    return torch.ones_like(block.weight, dtype=torch.bool) if isinstance(base, PackedWeight) else block.weight != 0


def codes_before_training(base: FrozenWeight) -> Quantized:
    """Return the codes that training began with: the base's own, or those of the floats before quantization."""
    if isinstance(base, PackedWeight):
        return base.codes()
    grid = base.grid()
    assert grid is not None
    return Quantized(grids.quantize(base.block().weight, grid), grid)


def count_unlike(layer: MergedLinear, on_cpu: Quantized, device: str) -> int:
    """Count the codes of a layer that come out differently on a device than on the CPU."""
    unlike = int((layer.to(device).codes().codes.cpu() != on_cpu.codes).sum())
    layer.to("cpu")
    return unlike


def warn_of_zero_points() -> None:
    """Say that some of the base's zero points are 0."""
    log.warning("the base has zero points of 0, which gptqmodel misreads in this format; auto-gptq does not")


def _count_different(one: Quantized, other: Quantized) -> int:
    return int((one.codes != other.codes).sum())
