"""How a merge compares the merged model with the one that was trained."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sqft.errors import ArtifactError
from sqft.stages.logits import logits_difference, logits_of


def pairs(actual: list[float], expected: list[float]) -> list[tuple[Tensor, Tensor]]:
    """Logits of two examples, all of one value each."""
    return [(torch.full((1, 3, 4), a), torch.full((1, 3, 4), e)) for a, e in zip(actual, expected, strict=True)]


def test_logits_are_float32() -> None:
    def model(input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache and not torch.is_grad_enabled()
        return SimpleNamespace(logits=input_ids.bfloat16()[..., None])

    logits = logits_of(model, torch.tensor([[1, 2], [3, 4]]))  # type: ignore[arg-type]
    assert logits.dtype == torch.float32 and logits.tolist() == [[[1], [2]], [[3], [4]]]


def test_the_largest_difference_of_logits() -> None:
    assert logits_difference([]) == 0
    assert logits_difference(pairs([1.0, 2.0], [1.0, 2.0])) == 0
    assert logits_difference(pairs([1.0, 2.0], [1.0, 2.015625])) == 0.015625
    assert logits_difference(pairs([1.015625, 2.0], [1.0, 2.0])) == 0.015625


def test_logits_further_apart_than_rounding_explains() -> None:
    with pytest.raises(ArtifactError, match=r"merge: logits of the merged model are 0\.125 off those of the model"):
        logits_difference(pairs([1.0, 2.0], [1.0, 2.125]))


@pytest.mark.parametrize(
    ("theirs", "ours"), [(0.0, math.nan), (math.nan, 0.0), (math.nan, math.nan), (math.inf, 0.0), (math.inf, math.inf)]
)
def test_logits_that_are_not_finite(theirs: float, ours: float) -> None:
    """Of the merged model or of the one that was trained, or of both alike; in any example."""
    for place in range(2):
        merged, trained = [0.0, 0.0], [0.0, 0.0]
        merged[place], trained[place] = ours, theirs
        with pytest.raises(ArtifactError, match="of the model that was trained, are not finite"):
            logits_difference(pairs(merged, trained))
