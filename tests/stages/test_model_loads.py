"""How often a run opens a model: nothing is loaded twice for the same purpose within a step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.modeling.loading import quantized, transformers_io

FLOATS = {
    "sparsify": 2,  # the recipe's own model, and the result read back
    "finetune": 1,  # the base under the adapters; what is stored is read back into it
    "search": 1,  # the same with what was trained
    "merge": 3,  # the same, the base that the result is written into, and the result read back
}
CODES = {
    "quantize": 1,  # codes are read back without a model around them
    "finetune": 2,  # the codes, and the floats before quantization
    "search": 2,
    "merge": 4,
}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models that were opened with their weights, one entry each time."""
    paths: list[Path] = []

    def counted(function: Any) -> Any:
        def count(spec: Any, *args: Any, **kwargs: Any) -> Any:
            paths.append(spec.path)
            return function(spec, *args, **kwargs)

        return count

    monkeypatch.setattr("sqft.modeling.loading.load_floats", counted(transformers_io.load_floats))
    monkeypatch.setattr(quantized, "_assemble", counted(quantized._assemble))
    return paths


@pytest.mark.parametrize(("quantize", "expected"), [(False, FLOATS), (True, CODES)], ids=["floats", "codes"])
def test_how_often_each_step_opens_a_model(
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    opened: list[Path],
    quantize: bool,
    expected: dict[str, int],
) -> None:
    del raw["evaluate"]
    raw["sparsify"] = {"scorer": "magnitude"}
    raw["finetune"] |= {"steps": 1, "targets": ["q_proj"]}
    raw["search"]["searcher"] = "heuristic"
    if quantize:
        del raw["sparsify"], raw["calibration"]
        raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
        raw["finetune"]["merger"] = "qa-sparsepeft"
    orchestrator = Orchestrator(registry, tmp_path / "store")
    plan = orchestrator.plan(Recipe.parse(raw))
    loads: dict[str, int] = Counter()
    for step in plan.steps:
        before = len(opened)
        orchestrator.run(plan, until=step.name)
        loads[step.stage] += len(opened) - before
    assert loads == expected
    opened.clear()
    orchestrator.run(plan)
    assert not opened  # every artifact is reused
