"""A plan as data: its steps, their components by kind, its specs of models, and its table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.api import Adapter, Merger, Scorer
from sqft.checkpoints.model_spec import ModelSpec
from sqft.planning.plan import Plan


@pytest.fixture
def plan(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> Plan:
    raw["model"] |= {"dtype": "bfloat16", "trust_remote_code": True}
    return Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))


def test_components_by_their_kind(plan: Plan) -> None:
    assert plan.step("sparsify").component(Scorer).name == "wanda"
    assert plan.step("sparsify").label(Scorer).startswith("scorer 'wanda' (sqft ")
    finetune = plan.step("finetune")
    assert (finetune.component(Adapter).name, finetune.component(Merger).name) == ("nls", "sparsepeft")
    with pytest.raises(KeyError):
        plan.step("merge").component(Scorer)


def test_what_identifies_a_component(plan: Plan) -> None:
    identity = plan.step("finetune").components["adapter"].identity
    assert (identity["name"], identity["class"]) == ("nls", "sqft_nls.adapter.Nls")
    assert identity["options"]["ranks"] == [8, 6, 4] and len(identity["code"]) == 64
    assert identity["provider"].startswith("sqft ")


def test_specs_of_models(plan: Plan, model_folder: Path) -> None:
    """Its own model in the recipe's precision, one that a step wrote as it is stored; trust holds for both."""
    assert plan.model_spec == plan.spec(plan.source.path) == ModelSpec(model_folder, "bfloat16", True)
    assert plan.spec(Path("elsewhere")) == ModelSpec(Path("elsewhere"), None, True)


def test_the_fingerprint_is_of_all_steps(plan: Plan, raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    again = Orchestrator(registry, tmp_path / "elsewhere").plan(Recipe.parse(raw))
    assert again.fingerprint == plan.fingerprint and len(plan.fingerprint) == 64
    raw["evaluate"]["exact_match"]["max_new_tokens"] += 1
    assert Orchestrator(registry, tmp_path).plan(Recipe.parse(raw)).fingerprint != plan.fingerprint


def test_the_table(plan: Plan) -> None:
    head, *rows = str(plan).splitlines()
    assert head.split() == ["STEP", "COMPONENTS", "PARAMETERS", "STORAGE", "MEMORY"]
    assert [row.split()[0] for row in rows] == [step.name for step in plan.steps]
    assert all(" run " in row for row in rows) and "wanda (sqft " in rows[0] and "MiB" in rows[0]
    reused = Plan(plan.recipe, plan.source, plan.adapter_base, plan.steps, frozenset({"sparsify"}))
    assert " reuse " in str(reused).splitlines()[1] and " run " in str(reused).splitlines()[2]
    shown = reused._repr_html_()
    assert shown.count("<tr>") == 1 + len(plan.steps) and "<td>reuse</td>" in shown and "wanda (sqft " in shown
    assert str(Plan(plan.recipe, plan.source, SimpleNamespace(), ())).count("\n") == 0  # type: ignore[arg-type]


def test_a_shell_shows_a_line(plan: Plan) -> None:
    reused = dataclasses.replace(plan, reused=frozenset({"sparsify"}), notes=("model.dtype: <wide>",))
    names = [step.name for step in plan.steps]
    assert repr(reused) == f"<Plan {plan.recipe.name}: sparsify (reused), {', '.join(names[1:])}>"
    assert repr(plan.step("sparsify")) == "<Step sparsify: scorer wanda, allocator uniform, 14 layers>"
    assert repr(plan.step("merge")) == "<Step merge>"
    assert reused._repr_html_().endswith("<p>note: model.dtype: &lt;wide&gt;</p>")
