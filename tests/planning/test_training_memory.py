"""What training needs, written out by hand. Teachers: test_distillation.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.planning.training_memory import activation_bytes, estimate_finetune
from sqft.recipe.sections import Finetune

SIZES = {"hidden_size": 32, "vocab_size": 10, "num_hidden_layers": 2, "intermediate_size": 64}
LAYER = 14 * 32 + 4 * 64
"""Floats that a layer keeps of each token."""


@pytest.mark.parametrize(
    ("settings", "kept", "labels"),
    [
        ({}, 2 * LAYER, 16),
        ({"gradient_checkpointing": True}, 2 * 32 + LAYER, 16),  # the inputs of both, and one that is computed again
        ({"loss_on": "all"}, 2 * LAYER, 64),
        ({"loss_on": "all", "loss_chunk": 5}, 2 * LAYER, 5),
    ],
)
def test_bytes_of_activations(settings: dict[str, Any], kept: int, labels: int) -> None:
    section = Finetune.model_validate(
        {"adapter": "nls", "merger": "sparsepeft", "data": "a", "batch_size": 4, "max_length": 16, **settings}
    )
    source = ModelSource("folder", Path("m"), "", {}, ModelLayout(sizes=SIZES))
    assert activation_bytes(source, section) == 4 * (4 * 16 * kept + 10 * 3 * labels)
    estimate = estimate_finetune(source, "float32", section, 100, 7)
    assert (estimate.parameters, estimate.storage) == (100, 400)
    assert estimate.memory == 7 + 16 * 100 + activation_bytes(source, section) + (1 << 29)
