"""What lies under the adapters, counted by hand. Codes: test_estimates.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry

SIZE = 4 * (258 * 32 + 2 * (9216 + 64) + 32)
"""The tiny model in float32."""
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


@pytest.mark.parametrize("streamed", [True, False])
def test_a_packed_base_that_is_read_as_a_whole_needs_the_whole(
    streamed: bool, raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, while it is loaded; where so little is pruned that nothing is packed, it is floats."""
    monkeypatch.setattr("sqft.planning.streaming.STREAM_FROM", 0 if streamed else 1 << 60)
    monkeypatch.setattr("sqft.planning.training_memory.activation_bytes", lambda *_: 0)
    raw["finetune"] |= {"base": "packed", "adapter": {"name": "lora", "options": {"rank": 1}}, "targets": ["k_proj"]}
    for sparsity in (0.75, 0.01):
        raw["sparsify"] = {"scorer": "magnitude", "sparsity": sparsity}
        plan = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))
        saved = max(0, LINEARS * (32 * sparsity - 1) / 8) if streamed or sparsity < 0.1 else 16 * 96
        trained = 16 * 96  # two layers of 32 inputs and 16 outputs
        assert plan.step("finetune").estimate.memory == SIZE + trained - saved + (1 << 29)


def test_packing_what_is_not_pruned_is_noted(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw["finetune"]["base"] = "packed"
    notes = []
    for sparsify in (raw["sparsify"], None):
        raw["sparsify"], raw["evaluate"]["of"] = sparsify, ["merge"]
        found = map(str, Orchestrator(registry, tmp_path).plan(Recipe.parse(raw)).notes)
        notes.append([note for note in found if note.startswith("finetune.base: this recipe does not prune")])
    assert [len(found) for found in notes] == [0, 1]


GPTQ = {"quantizer": {"name": "rtn", "options": {"bits": 4, "group_size": 32}}}


@pytest.mark.parametrize(
    ("quantize", "start", "merger", "copies"),
    [
        (None, "floats", "sparsepeft", 1),
        (None, "packed", "sparsepeft", 1),  # with its zeros, at first
        (GPTQ, "floats", "qa-sparsepeft", 2),  # and the values of the codes, at first
        (GPTQ, "codes", "qa-sparsepeft", 0),
        (GPTQ, "floats", "unmerged", 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("streamed", [True, False])
def test_a_search_that_evaluates_nothing_needs_its_base_only_where_it_is_loaded(
    quantize: Any,
    start: str,
    merger: str,
    copies: int,
    streamed: bool,
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sqft.planning.streaming.STREAM_FROM", 0 if streamed else 1 << 60)
    raw |= {"search": {}, "quantize": quantize}
    raw["finetune"] |= {"base": start, "merger": merger}
    if merger == "unmerged":
        raw.pop("merge", None)
        raw["evaluate"]["of"] = ["search"]
    step = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw)).step("search")
    assert step.streamed == streamed
    needed = step.estimate.memory - (1 << 29)
    if streamed:
        assert needed == 2 * step.estimate.storage
    elif copies:
        assert needed == copies * SIZE + step.estimate.storage
    else:
        assert step.estimate.storage < needed < SIZE


def test_a_search_that_evaluates_is_not_streamed(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqft.planning.streaming.STREAM_FROM", 0)
    plan = Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))
    assert plan.step("merge").streamed and not plan.step("search").streamed
