"""Measuring a model: what counts as a zero, and what is written down."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry
from sqft.modeling.architecture.blocks import linears
from sqft.stages.evaluate import EvaluateStage, count_zeros
from sqft.stages.inputs import StageInputs


def test_zeros_of_the_linear_layers_in_decoder_blocks(model: Any) -> None:
    """Not of embeddings, norms or the head, which are never pruned."""
    layers = linears(model)
    weights = sum(layer.weight.numel() for layer in layers.values())
    assert count_zeros(model) == {"sparsity": 0.0, "zeros": 0, "weights": weights}
    next(iter(layers.values())).weight.data[:3] = 0
    model.get_input_embeddings().weight.data.zero_()
    assert count_zeros(model)["zeros"] == 3 * 32 and count_zeros(model)["sparsity"] == 96 / weights


def test_a_model_is_measured_and_every_item_written_down(
    raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    raw = {key: raw[key] for key in ("schema", "name", "model", "evaluate")}
    raw["evaluate"]["of"] = ["model"]
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    stage = EvaluateStage(StageInputs(plan, plan.step("evaluate:model"), {}, tmp_path, "cpu"))
    report = stage.run()
    stage.verify()
    written = json.loads((tmp_path / "results.json").read_text())
    assert math.isfinite(report["perplexity"]["perplexity"]) and report["sparsity"] == 0
    assert len(written["exact_match"]["outcomes"]) == 10 and "outcomes" not in report["exact_match"]
    assert {k: v for k, v in written["exact_match"].items() if k != "outcomes"} == report["exact_match"]
