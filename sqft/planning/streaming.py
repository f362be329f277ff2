"""Which steps go through the model one decoder block at a time. No torch."""

from __future__ import annotations

from sqft.checkpoints.model_source import ModelSource
from sqft.planning.estimates import model_bytes

STREAM_FROM = 2 << 30
"""Bytes of a model from which on it is not read as a whole. A smaller one is written as one file."""


def is_streamed(model: ModelSource, dtype: str, made_by_step: bool) -> bool:
    """Return whether a step that compresses a model reads, changes and writes it one decoder block at a time.

    Args:
        model: the recipe's model.
        dtype: its precision.
        made_by_step: whether what is read was written by another step, and so is a folder of floats.
    """
    floats = made_by_step or (model.kind == "folder" and model.quantization is None and not model.dequantize)
    one_by_one = model.layout.walk == "blocks" and not model.layout.shared
    return floats and one_by_one and model_bytes(model, dtype) >= STREAM_FROM
