"""What sparsify and quantize share: give a layer the weight that a component computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqft.errors import StageError


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
