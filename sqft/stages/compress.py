"""What sparsify and quantize share: the calibration walk, and giving a layer the weight that a component computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.errors import StageError
from sqft.modeling.calibration.walk import walk
from sqft.stages.inputs import StageInputs
from sqft.types import LinearStats, Statistic


def assign_weight(label: str, name: str, linear: nn.Linear, value: Tensor) -> None:
    """Give a layer the weight that a component computed in float32, in the model's precision.

    Raises:
        StageError: when the weight is too large for it.
    """
    linear.weight.data.copy_(value)
    if lost := int((~linear.weight.isfinite()).sum()):
        dtype = str(linear.weight.dtype).removeprefix("torch.")
        raise StageError(
            f"{label} gave {name} {lost} weights that {dtype}, the model's precision, does not hold: the largest is "
            f"{value.abs().max().item():.3g} and {dtype} ends at {torch.finfo(linear.weight.dtype).max:.3g}; set "
            "model.dtype to bfloat16 or float32, or give more calibration text"
        )


def run_calibration(
    inputs: StageInputs,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, nn.Linear],
    needs: frozenset[Statistic],
    compress: Callable[[str, nn.Linear, LinearStats], None],
    label: str,
    sequential: bool = False,
) -> int:
    """Call `compress` on each layer with the statistics it needs; return how many calibration tokens that took."""
    if not needs:
        for name, linear in inputs.track(layers.items(), label, len(layers)):
            compress(name, linear, LinearStats(tokens=0))
        return 0
    windows = inputs.data.calibration(tokenizer)
    walk(model, windows, set(layers), needs, compress, inputs.device, inputs.track, sequential)
    return windows.numel()
