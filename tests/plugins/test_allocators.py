"""Allocators: the whole is what was asked for, and the parts are what they promise."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_owl import Owl
from sqft_uniform import Explicit

from sqft import Orchestrator, Recipe, Registry
from sqft.api import LinearShape, LinearStats
from sqft.errors import RecipeError, StageError

LAYERS = [
    LinearShape(f"m.{block}.{name}", 10, 10 * (1 + block)) for block in range(3) for name in ("q_proj", "up_proj")
]


def spent(found: Any) -> float:
    sizes = {layer.name: layer.out_features * layer.in_features for layer in LAYERS}
    return float(sum(found[name] * size for name, size in sizes.items()) / sum(sizes.values()))


def test_outliers_are_counted_over_the_block() -> None:
    weights = {"a": torch.ones(2, 4), "b": torch.ones(2, 4)}
    weights["b"][0, 1] = -40.0
    stats = {name: LinearStats(3, input_sq_sum=torch.tensor([1.0, 1.0, 4.0, 1.0])) for name in weights}
    # Scores: 1, 1, 2, 1 in each row, and one of 40: a sum of 20 − 1 + 40, a mean of 59 / 16, times 5 a bar of 18.4.
    assert Owl().measure(weights, stats) == {"a": 1 / 16, "b": 1 / 16}
    assert Owl(outlier=11).measure(weights, stats) == {"a": 0.0, "b": 0.0}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(0.4, 0.6), st.floats(0, 0.19))
def test_owl_spends_what_was_asked_for(outliers: list[float], sparsity: float, spread: float) -> None:
    measured = {layer.name: outliers[int(layer.name[2])] for layer in LAYERS}
    found = Owl(spread=spread).allocate(LAYERS, sparsity, measured)
    assert spent(found) == pytest.approx(sparsity)
    assert max(found.values()) - min(found.values()) == pytest.approx(2 * spread if len(set(outliers)) > 1 else 0)
    ranked = sorted(found, key=lambda name: -measured[name])
    assert all(found[one] <= found[other] + 1e-12 for one, other in pairwise(ranked))


def test_owl_leaves_0_to_1() -> None:
    measured = {layer.name: float(layer.name[2]) for layer in LAYERS}
    with pytest.raises(StageError, match=r"a spread of 0\.4 around a sparsity of 0\.2 goes below 0 or above 1"):
        Owl(spread=0.4).allocate(LAYERS, 0.2, measured)


def test_explicit_values_and_the_rest() -> None:
    found = Explicit(values={"*.q_proj": 0.25, "m.0.q_proj": 0.0}).allocate(LAYERS, 0.5, {})
    assert (found["m.0.q_proj"], found["m.1.q_proj"], found["m.2.q_proj"]) == (0.0, 0.25, 0.25)
    assert spent(found) == pytest.approx(0.5)
    assert found["m.0.up_proj"] == found["m.2.up_proj"] > 0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"q_proj": 0.3}, "no pruned layer gets its value from 'q_proj'"),
        ({"*": 0.3}, r"the given values alone prune 0\.300 of all weights, but sparsify.sparsity is 0\.5"),
        ({"m.0.*": 0.1, "m.*.*_proj": 0.5}, r"gets its value from 'm\.0\.\*'"),
        ({"*.q_proj": 0.99, "m.2.*": 0.99}, r"prune 0\.7\d+ of all weights"),
    ],
)
def test_explicit_values_that_cannot_be(values: dict[str, float], words: str) -> None:
    with pytest.raises(StageError, match=words):
        Explicit(values=values).allocate(LAYERS, 0.5, {})
    assert spent(Explicit(values={"*": 0.5}).allocate(LAYERS, 0.5, {})) == 0.5


def test_owl_on_a_model(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    kept = {key: raw[key] for key in ("schema", "name", "model", "calibration")}
    options = {"outlier": 2, "spread": 0.1}
    kept["sparsify"] = {"scorer": "magnitude", "allocator": {"name": "owl", "options": options}}
    orchestrator = Orchestrator(registry, tmp_path)
    report = orchestrator.run(orchestrator.plan(Recipe.parse(kept)))["sparsify"].report
    layers = {name: round(value, 1) for name, value in report["layers"].items()}
    assert len(set(layers.values())) == 2 and report["sparsity"] == pytest.approx(0.5, abs=0.02)
    del kept["calibration"]
    with pytest.raises(RecipeError, match="calibration: is missing: allocator 'owl' needs input-norm"):
        orchestrator.plan(Recipe.parse(kept))


def test_n_m_leaves_nothing_to_allocate(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw["sparsify"] |= {"allocator": "owl", "pattern": "2:4"}
    expected = r"sparsify\.allocator: cannot be used with the pattern '2:4', which gives every layer the same sparsity"
    with pytest.raises(RecipeError, match=expected):
        Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))
    raw["sparsify"]["allocator"] = "uniform"
    Orchestrator(registry, tmp_path).plan(Recipe.parse(raw))
