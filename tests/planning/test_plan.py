"""Estimates of memory against sums written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry

SIZE = 4 * (258 * 32 + 2 * (9216 + 64) + 32)
"""The tiny model in float32."""
STATES = 3 * (4 * 32) * 32 * 4
BLOCK = 4 * (6 * 32**2 + 64**2)
"""The Hessians of a block: q, k, v, o, gate and up of 32 inputs, down of 64."""
CODES = 2 * 9216
WORK = 3 * 4 * 64**2


def memory(recipe: dict[str, Any], registry: Registry, folder: Path, step: str) -> int:
    kept = {key: recipe[key] for key in ("schema", "name", "model", "calibration", step)}
    found = Orchestrator(registry, folder).plan(Recipe.parse(kept)).step(step).estimate.memory
    return found - SIZE - (1 << 29)


@pytest.mark.parametrize(
    ("sparsify", "expected"),
    [
        ({"scorer": "wanda"}, SIZE),  # the second model that the proof reads is more
        ({"scorer": "magnitude"}, SIZE),
        ({"scorer": "sparsegpt"}, STATES + BLOCK + WORK),
        ({"scorer": "sparsegpt", "exclude": ["down_proj"]}, SIZE),
        ({"scorer": "sparsegpt", "allocator": "owl"}, STATES + BLOCK + WORK),
    ],
    ids=str,
)
def test_sparsify_counts_hessians(
    sparsify: dict[str, Any], expected: int, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    assert memory(raw | {"sparsify": sparsify}, registry, tmp_path, "sparsify") == expected


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [("gptq", STATES + 4 * 4 * 32**2 + WORK), ("rtn", SIZE)],  # q, k, v and o are as much as down
)
def test_quantize_counts_those_of_one_module(
    quantizer: str, expected: int, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    raw["quantize"] = {"quantizer": {"name": quantizer, "options": {"group_size": 32}}}
    assert memory(raw, registry, tmp_path, "quantize") == expected + 2 * CODES


@pytest.mark.parametrize(
    ("merger", "base", "packed"),
    [("qa-sparsepeft", "floats", False), ("qa-sparsepeft", "codes", True), ("unmerged", "floats", True)],
)
def test_codes_under_an_adapter_are_counted_packed(
    merger: str, base: str, packed: bool, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    for name in ("merge", "evaluate"):
        raw.pop(name)
    of_floats = {key: value for key, value in raw.items() if key != "quantize"}
    raw["finetune"] = {**raw["finetune"], "merger": merger, "base": base}
    orchestrator = Orchestrator(registry, tmp_path)
    floats, plan = orchestrator.plan(Recipe.parse(of_floats)), orchestrator.plan(Recipe.parse(raw))
    spared = SIZE - plan.step("quantize").estimate.storage
    assert spared > 0
    found = floats.step("finetune").estimate.memory - plan.step("finetune").estimate.memory
    assert found == (spared if packed else 0)
