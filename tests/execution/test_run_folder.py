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
from sqft.execution.run import Run
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
    assert len(steps[0]["code"]) == 64 and steps[0]["digests"] == dict(plan.steps[0].digests) != {}


def finished(store: Store, plan: Plan, folder: Path, *steps: str) -> Run:
    """A run whose artifacts hold a model each."""
    outcomes: Any = {}
    for name in steps:
        artifact = store.artifacts / f"{name}-0123456789ab"
        (artifact / "model").mkdir(parents=True, exist_ok=True)
        outcomes[name] = SimpleNamespace(step=plan.step(name), folder=artifact)
    return Run(plan, folder, outcomes, make_report(plan, {}))


def test_a_report_names_its_artifacts_and_its_result(store: Store, plan: Plan) -> None:
    folder = make_run_folder(store, plan)
    run = finished(store, plan, folder, "sparsify", "merge")
    write_report(store, run, "2026-01-01T00:00:00+00:00")
    assert json.loads((folder / "report.json").read_text()) == run.report
    assert (folder / "report.md").read_text().startswith("# ")
    content = json.loads((folder / "run.json").read_text())
    assert content["started"] == "2026-01-01T00:00:00+00:00" <= content["finished"]
    assert {"sqft", "torch"} <= content["versions"].keys()
    assert content["artifacts"]["merge"] == "../../artifacts/merge-0123456789ab"
    result = (folder / content["result"]).resolve()
    assert result == (store.artifacts / "merge-0123456789ab" / "model").resolve()
    assert content["loading"].endswith('from_pretrained("{result}", dtype="auto")')


def test_the_first_start_is_kept_and_a_damaged_record_is_replaced(store: Store, plan: Plan) -> None:
    folder = make_run_folder(store, plan)
    for start in ("2026-01-01", "2026-01-02"):
        write_report(store, finished(store, plan, folder, "sparsify"), start)
    assert json.loads((folder / "run.json").read_text())["started"] == "2026-01-01"
    (folder / "run.json").write_text("{")
    write_report(store, finished(store, plan, folder, "sparsify"), "2026-01-03")
    assert json.loads((folder / "run.json").read_text())["started"] == "2026-01-03"


def test_a_run_that_leaves_nothing_to_load(store: Store, plan: Plan) -> None:
    folder = make_run_folder(store, plan)
    write_report(store, Run(plan, folder, {}, make_report(plan, {})), "2026-01-01")
    assert not {"result", "loading"} & json.loads((folder / "run.json").read_text()).keys()


def test_a_store_that_cannot_be_written_is_named(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=str(tmp_path / "file")):
        make_run_folder(Store(tmp_path / "file" / "store"), plan)
