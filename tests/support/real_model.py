"""The real model at INT4, untuned, made once in ./store and opened by several programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry
from tests.support.elsewhere import ROOT

PROBLEMS = ROOT / "examples" / "quickstart" / "data" / "test.jsonl"


def real_int4() -> Path:
    """SmolLM2 with 30 % zeros, 4 bits in symmetric groups of 64: the folder of a GPTQ checkpoint."""
    raw: dict[str, Any] = {
        "name": "gguf",
        "model": {"path": str(ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf")},
        "sparsify": {"scorer": "magnitude", "sparsity": 0.3},
        "quantize": {"quantizer": {"name": "rtn", "options": {"group_size": 64}}},
    }
    orchestrator = Orchestrator(Registry.discover(), ROOT / "store")
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))["quantize"].folder / "model"
