"""Compare the logits of a merged model with those of the model that was trained."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sqft.errors import ArtifactError

LOGITS_TOLERANCE = 1e-2
"""Largest difference of logits, relative to the largest logit: equal weights differ in the order of sums only."""


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return a model's logits [examples, tokens, vocabulary], float32, for token ids [examples, tokens]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def logits_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference between the logits of the merged model and of the model that was trained.

    Args:
        pairs: both, for some examples.

    Raises:
        ArtifactError: when it is larger than rounding explains, or when a logit is not finite.
    """
    differences, sizes = [0.0], [0.0]
    for actual, expected in pairs:
        differences.append(float((actual - expected).abs().max()))
        sizes.append(float(expected.abs().max()))
    largest, size = (float(torch.tensor(values).max()) for values in (differences, sizes))  # max() would ignore NaN
    if not (math.isfinite(largest) and math.isfinite(size)):
        raise ArtifactError("merge: the logits of the merged model, or of the model that was trained, are not finite")
    if largest > LOGITS_TOLERANCE * size:
        raise ArtifactError(
            f"merge: logits of the merged model are {largest:.3g} off those of the model that was trained"
        )
    return largest
