"""Which bases are read for a part. What is merged into them: test_merge_in_parts.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from sqft_gptq import Rtn

from sqft import Orchestrator, Recipe, Registry
from sqft.modeling.adapters.frozen_weight import FloatWeight, PackedWeight
from sqft.modeling.loading.parts import OUTSIDE
from sqft.stages.inputs import StageInputs
from sqft.stages.merge import MergeStage
from sqft.stages.merge_bases import CodeBases, FloatBases

Q, BLOCK = "model.layers.1.self_attn.q_proj", "model.layers.1"


def bases_of(raw: dict[str, Any], registry: Registry, folder: Path) -> FloatBases:
    orchestrator = Orchestrator(registry, folder / "store")
    plan = orchestrator.plan(Recipe.parse(raw))
    run = orchestrator.run(plan, "search")
    step = dataclasses.replace(plan.step("merge"), streamed=True)
    return MergeStage(StageInputs(plan, step, run.inputs("merge"), folder, "cpu")).in_parts.bases


def test_floats(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    found = bases_of(raw, registry, tmp_path)
    assert not isinstance(found, CodeBases) and found.before(Q) is None and found.coded(BLOCK, {}) == {}
    with found.opened.held(BLOCK):
        base = found.bases(BLOCK, [Q])[Q]
        assert isinstance(base, FloatWeight) and base.weight is found.linears[Q].weight and base.grid() is None


@pytest.mark.parametrize("start", ["floats", "codes", "compensated"])
def test_codes(raw: dict[str, Any], registry: Registry, tmp_path: Path, start: str) -> None:
    """The floats that were quantized are read for a block with adapters only, and with embeddings never."""
    assert Rtn.gives_compensated
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw["finetune"] |= {"merger": "qa-sparsepeft", "base": start}
    found = bases_of(raw, registry, tmp_path)
    assert isinstance(found, CodeBases) and (found.floats is not None) == (start == "floats")
    outline = found.outline(Q, with_grid=True)
    assert outline.grid() is not None and found.outline(Q, with_grid=False).grid() is None
    read: list[str] = []
    if found.floats:
        load = found.floats.load
        found.floats.load = lambda part, *rest: (read.append(part), load(part, *rest))[1]  # type: ignore[method-assign, func-returns-value]
    with found.opened.held(OUTSIDE):
        assert found.bases(OUTSIDE, []) == {}
    with found.opened.held(BLOCK):
        base = found.bases(BLOCK, [Q])[Q]
    assert read == ([BLOCK] if start == "floats" else [])
    assert isinstance(base, FloatWeight if start == "floats" else PackedWeight)
    before, block = found.before(Q), base.block()
    assert before is not None and block.mask is not None and 0 < block.mask.float().mean() < 1
    assert found.coded(BLOCK, {}).keys() == {name for name in found.stored.layers if name.startswith(BLOCK)}
    if isinstance(base, PackedWeight):
        assert (base.residual is not None) == (start == "compensated")
