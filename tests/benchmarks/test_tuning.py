"""The benchmark of tuning: its statistics against other ways to compute them, its sweep, and its recipes."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqft import Orchestrator, Registry

FILE = Path(__file__).parents[2] / "benchmarks" / "tuning.py"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tuning_benchmark", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses looks for it
    spec.loader.exec_module(module)
    return module


tuning = loaded()
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)


@given(pairs)
def test_the_error_is_over_records(both: list[tuple[bool, bool]]) -> None:
    """Two seeds that agree count once: the same records are no new ones."""
    once = {(0, n): right for n, (right, _) in enumerate(both)}
    twice = once | {(1, n): right for (_, n), right in once.items()}
    mean, error = tuning.accuracy_of(once)
    assert tuning.accuracy_of(twice) == pytest.approx((mean, error))
    assert mean == pytest.approx(statistics.mean(map(float, once.values())))
    assert error == pytest.approx(math.sqrt(mean * (1 - mean) / (len(both) - 1)))


@pytest.mark.parametrize(
    ("top", "tried", "best"),
    [
        (2e-3, [1e-3, 2e-3, 4e-3], 2e-3),
        (16e-3, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3], 16e-3),
        (0.25e-3, [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3, 0.125e-3], 0.25e-3),
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3], 32e-3),  # no more than three beyond those given
    ],
)
def test_the_sweep_goes_on_while_the_best_is_at_the_edge(top: float, tried: list[float], best: float) -> None:
    class Fake:
        def measure(self, way: str, rate: float, seeds: list[int], of: str) -> Any:
            right = round(100 / (1 + abs(math.log2(rate / top))))
            return {seed: tuning.Measured([n < right for n in range(100)], {}, 0.0) for seed in seeds}

    found = tuning.sweep(Fake(), "way", [4e-3, 1e-3, 2e-3], 3, [0])
    assert list(found) == pytest.approx(sorted(tried)) and tuning.best_of(found) == pytest.approx(best)
    assert list(tuning.sweep(Fake(), "way", [2e-3], 3, [0])) == [2e-3]


@pytest.mark.parametrize("way", ["recipe", "hira,root,lora+", "adapter.options.alpha=8,hira,sparsify.scorer=magnitude"])
def test_every_way_is_a_recipe_on_the_same_base(raw: dict[str, Any], data: Path, tmp_path: Path, way: str) -> None:
    """Validation measures no test record, and training does not depend on which of the two is measured."""
    del raw["search"]
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(raw))
    made = tuning.Tuning(file, data / "validation.jsonl", 3, Orchestrator(Registry.discover(), tmp_path / "store"))
    plans = {of: made.orchestrator.plan(made.recipe(way, 0.02, 1, of)) for of in ("base", "validation", "tuned")}
    steps = {of: {step.name: step.fingerprint for step in plan.steps} for of, plan in plans.items()}
    assert list(steps["base"]) == ["sparsify", "evaluate:sparsify"]
    assert list(steps["validation"]) == ["sparsify", "finetune", "search", "evaluate:search"]
    assert list(steps["tuned"]) == ["sparsify", "finetune", "search", "merge", "evaluate:merge"]
    assert all(steps["validation"][name] == steps["tuned"][name] for name in ("sparsify", "finetune", "search"))
    assert steps["base"]["sparsify"] == steps["tuned"]["sparsify"]
    assert plans["validation"].step("evaluate:search").files["exact_match.data"] == data / "validation.jsonl"
    assert plans["tuned"].step("evaluate:merge").files["exact_match.data"] == data / "test.jsonl"
    assert plans["tuned"].recipe.seed == 1
    section = plans["tuned"].recipe.finetune
    assert section and (section.learning_rate, section.seed, section.steps) == (0.02, None, 3)
    scorer = plans["base"].recipe.sparsify
    assert scorer and scorer.scorer.name == ("magnitude" if "magnitude" in way else "wanda")
    assert section.merger.name == ("hira" if "hira" in way else "sparsepeft")
    assert section.learning_rate_ratio == (16 if "lora+" in way else 1)
    assert section.adapter.options.get("scaling") == ("root" if "root" in way else None)


def test_a_way_may_change_any_section(raw: dict[str, Any], tmp_path: Path) -> None:
    """And the base is that of the changed recipe."""
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(raw))
    made = tuning.Tuning(file, tmp_path, None, Orchestrator(Registry.discover(), tmp_path / "store"))
    recipe = made.recipe("quantize=null,merger=sparsepeft,calibration.samples=3,seed=5", 0.01, 2, "base")
    assert recipe.calibration.samples == 3 and recipe.seed == 2 and recipe.evaluate.of == ("sparsify",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--validation", "nowhere.jsonl"], "recipe, validation: .*nowhere.jsonl"),
        (["--learning-rates", "0.1", "0"], "recipe, validation: .*learning_rate"),
        (["--recipe", "nowhere.json"], "nowhere.json"),
    ],
    ids=str,
)
def test_a_mistake_shows_before_anything_is_made(
    raw: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    del raw["search"]
    file, store = tmp_path / "recipe.json", tmp_path / "store"
    file.write_text(json.dumps(raw))
    words = ["--recipe", str(file), "--store", str(store), "--ways", "recipe", *words]
    monkeypatch.setattr(sys, "argv", ["tuning.py", *words])
    with pytest.raises(SystemExit, match="2"):
        tuning.main()
    assert re.search(f"error: .*{message}", capsys.readouterr().err, re.DOTALL)
    assert not (store / "artifacts").exists()


@pytest.mark.slow
def test_both_tables(raw: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    del raw["search"], raw["merge"]
    raw["finetune"]["targets"] = ["q_proj"]
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(raw))
    words = ["--recipe", file, "--ways", "recipe", "hira", "--learning-rates", "0.01", "--steps", "2"]
    words += ["--seeds", "0", "--store", tmp_path / "store"]
    monkeypatch.setattr(sys, "argv", ["tuning.py", *map(str, words)])
    tuning.main()
    shown = capsys.readouterr().out.splitlines()
    tables = [line for line in shown if line.startswith("|")]
    assert [line.split(" | ")[0] for line in tables if "---" not in line] == [
        "| validation", "| recipe", "| hira", "| test", "| recipe", "| hira",
    ]  # fmt: skip
    assert "p = " in tables[-1] and "p = " not in tables[-2] and all("–" not in line for line in tables[-3:-1])
    trained = list((tmp_path / "store" / "artifacts").glob("finetune-*"))
    assert len(trained) == 2 and len(list((tmp_path / "store" / "artifacts").glob("sparsify-*"))) == 1
