"""The folder of a run: its name, and what is written into it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import StoreError
from sqft.execution.report import make_report
from sqft.execution.run_folder import make_run_folder, now, write_plan, write_report
from sqft.planning.plan import Plan
from sqft.store.artifacts import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def plan(raw: dict[str, Any], registry: Registry, store: Store) -> Plan:
    return Orchestrator(registry, store.root).plan(Recipe.parse(raw))


def test_times_are_utc_and_to_the_second() -> None:
    assert abs((datetime.fromisoformat(now()) - datetime.now(UTC)).total_seconds()) < 5 and "." not in now()


def test_another_recipe_of_the_same_name_has_another_folder(
    raw: dict[str, Any], registry: Registry, store: Store, plan: Plan
) -> None:
    raw["finetune"]["steps"] += 1
    other = Orchestrator(registry, store.root).plan(Recipe.parse(raw))
    folders = [make_run_folder(store, one) for one in (plan, plan, other)]
    assert folders[0] == folders[1] != folders[2] and all(folder.parent == store.runs for folder in folders)
    assert folders[0].name == f"tiny-{plan.fingerprint[:8]}"


def test_recipe_and_plan_are_enough_to_go_on(store: Store, plan: Plan) -> None:
    folder = make_run_folder(store, plan)
    write_plan(store, folder, plan)
    again = Recipe.parse(json.loads((folder / "recipe.json").read_text()))
    assert again.model_dump() == plan.recipe.model_dump()
    steps = json.loads((folder / "plan.json").read_text())
    assert [(step["name"], step["fingerprint"]) for step in steps] == [(s.name, s.fingerprint) for s in plan.steps]
    assert steps[0]["components"]["scorer"]["name"] == "wanda" and steps[0]["estimate"]["parameters"] > 0
    assert len(steps[0]["code"]) == 64


def test_a_report_names_its_artifacts(store: Store, plan: Plan) -> None:
    folder = make_run_folder(store, plan)
    outcomes: Any = {"merge": SimpleNamespace(folder=store.artifacts / "merge-0123456789ab")}
    report = make_report(plan, {})
    write_report(store, folder, report, outcomes, "2026-01-01T00:00:00+00:00")
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "report.md").read_text().startswith("# ")
    content = json.loads((folder / "run.json").read_text())
    assert content["started"] == "2026-01-01T00:00:00+00:00" <= content["finished"]
    assert {"sqft", "torch"} <= content["versions"].keys()
    assert content["artifacts"] == {"merge": "../../artifacts/merge-0123456789ab"}


def test_a_store_that_cannot_be_written_is_named(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=str(tmp_path / "file")):
        make_run_folder(Store(tmp_path / "file" / "store"), plan)
