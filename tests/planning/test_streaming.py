"""Which models are never in memory as a whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.planning.streaming import STREAM_FROM, is_streamed

LARGE = ModelSource("folder", Path("m"), "", {"w": (STREAM_FROM // 2, 1)})


@pytest.mark.parametrize(
    ("change", "made_by_step", "expected"),
    [
        ({}, False, True),
        ({"shapes": {"w": (STREAM_FROM // 2 - 1, 1)}}, False, False),
        ({"kind": "gguf"}, False, False),
        ({"kind": "gguf"}, True, True),  # what a step wrote is a folder of floats
        ({"quantization": {"bits": 4}}, False, False),
        ({"dequantize": True}, False, False),
        ({"layout": ModelLayout(walk="model")}, True, False),
        ({"layout": ModelLayout(shared={"a": "b"})}, True, False),
    ],
)
def test_which_models_are_streamed(change: dict[str, Any], made_by_step: bool, expected: bool) -> None:
    model = dataclasses.replace(LARGE, **change)
    assert is_streamed(model, "bfloat16", made_by_step) == expected
