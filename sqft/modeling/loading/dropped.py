"""Say which parts of a checkpoint have no place in the class that is loaded: towers, further heads."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.architecture.names import CheckpointNames

log = logging.getLogger("sqft")


def dropped_parts(model: PreTrainedModel, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the modules that a checkpoint has and the model has not, each with the number of its weights.

    What lies inside the decoder blocks does not count: tensors there that a class does not read are of no use to it
    (masks and frequencies of old checkpoints, keys and values of layers that share those of others).

    Args:
        model: after `as_linears`.
        shapes: shape of every tensor by its name in the checkpoint.
    """
    names, blocks = CheckpointNames(model), tuple(f"{block}." for block in decoder_blocks(model))
    modules = {name for name, _ in model.named_modules()}
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        parents = names.module_tensor(name).split(".")[:-1]
        above = (".".join(parents[: depth + 1]) for depth in range(len(parents)))
        part = next((module for module in above if module not in modules), "")
        if part and not part.startswith(blocks):
            found[part] = found.get(part, 0) + math.prod(shape)
    return found


def warn_of_dropped(model: PreTrainedModel, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Log which parts of the checkpoint `path` are not in the model, and so not in what is made of it."""
    if parts := dropped_parts(model, shapes):
        listed = ", ".join(f"{name} ({weights:,} weights)" for name, weights in parts.items())
        log.warning("%s: %s has no place for %s: left out of what is made of it", path, type(model).__name__, listed)
