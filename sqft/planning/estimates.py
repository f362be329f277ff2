"""What a step is expected to need: memory and storage, computed from headers and settings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sqft.checkpoints.model_source import ModelSource
from sqft.recipe.sections import Calibration, Finetune
from sqft.types import HESSIAN_BYTES, LinearShape, Statistic

BLOCK = re.compile(r".*?\.\d+\.")
"""What the names of a decoder block's layers begin with."""


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to need: numbers from headers and settings, before anything is loaded."""

    parameters: int
    storage: int  # bytes its artifact will take
    memory: int  # bytes at its peak


def activation_bytes(source: ModelSource, section: Finetune) -> int:
    """Bytes kept for backward: an upper bound, for every example as long as max_length."""
    size = source.size
    hidden, layers = size("hidden_size"), size("num_hidden_layers", default=1)
    inner = size("intermediate_size", default=4 * hidden)
    tokens = section.batch_size * section.max_length
    kept = (hidden if section.gradient_checkpointing else 14 * hidden + 4 * inner) * layers
    labels = tokens if section.loss_on == "all" else tokens // 4
    logits = size("vocab_size") * 3 * min(labels, section.loss_chunk or labels)
    return 4 * (tokens * kept + logits)


def calibration_bytes(
    source: ModelSource,
    calibration: Calibration | None,
    needs: frozenset[Statistic],
    layers: Iterable[LinearShape],
    sequential: bool = False,
) -> int:
    """Bytes that the calibration walk takes beside the model: hidden states of all windows and, where a component needs
    them, the Hessians of a block's layers, which are summed at once (with `sequential`, those of one module and width,
    up to `HESSIAN_BYTES`), with three more of the widest's size for whoever inverts it."""
    if calibration is None:
        return 0
    states = 3 * calibration.samples * calibration.length * source.size("hidden_size") * 4
    together: Counter[tuple[str, ...]] = Counter()
    widest = 0
    for layer in layers if Statistic.HESSIAN in needs else ():
        block, inner = BLOCK.match(layer.name), layer.in_features
        within = layer.name[block.end() :] if block else layer.name
        # Experts are one module, whatever their number.
        place = (re.sub(r"\d+", "*", within.rpartition(".")[0]), str(inner)) if sequential else ()
        together[block[0] if block else "", *place] += 4 * inner**2
        widest = max(widest, 4 * inner**2)
    at_once = max(together.values(), default=0)
    return states + (min(at_once, max(HESSIAN_BYTES, widest)) if sequential else at_once) + 3 * widest
