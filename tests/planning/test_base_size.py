"""What lies under the adapters, counted by hand. Codes: test_estimates.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry

LINEARS = 2 * 9216
"""Weights of the tiny model's linear layers."""


@pytest.mark.parametrize(
    ("dtype", "bits", "sparsity"), [("float32", 32, 0.5), ("bfloat16", 16, 0.5), ("bfloat16", 16, 0.75)]
)
@pytest.mark.parametrize("exclude", [[], ["down_proj"]])
def test_packed_floats_take_a_bit_and_what_is_not_zero(
    dtype: str, bits: int, sparsity: float, exclude: list[str], raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    """Layers without an adapter too; those that are not pruned stay floats."""
    raw["model"]["dtype"] = dtype
    raw["sparsify"] = {"scorer": "magnitude", "sparsity": sparsity, "exclude": exclude}
    found = {}
    for base in ("floats", "packed"):
        raw["finetune"]["base"] = base
        plan = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))
        found[base] = plan.step("finetune").estimate.memory
    pruned = LINEARS - (2 * 32 * 64 if exclude else 0)
    assert found["floats"] - found["packed"] == pruned * (bits * sparsity - 1) / 8
