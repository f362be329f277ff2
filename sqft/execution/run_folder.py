"""The folder of a run, `runs/NAME-xxxxxxxx`: recipe, plan, report, and links to the artifacts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqft.execution.report import report_markdown
from sqft.execution.run import Outcome
from sqft.planning.fingerprint import core_digest
from sqft.planning.plan import Plan, Step
from sqft.recipe.rerun import with_absolute_paths
from sqft.store.artifacts import Store
from sqft.utils.files import write_json
from sqft.utils.resources import versions


def now() -> str:
    """Return the time, UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def make_run_folder(store: Store, plan: Plan) -> Path:
    """Make and return the folder of a plan's runs: a different recipe of the same name has a different fingerprint.

    Raises:
        StoreError: when it cannot be made.
    """
    folder = store.runs / f"{plan.recipe.name}-{plan.fingerprint[:8]}"
    with store.writing():
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_plan(store: Store, folder: Path, plan: Plan) -> None:
    """Write recipe and plan into a run's folder, which from then on protects the plan's artifacts from pruning.

    Raises:
        StoreError: when it cannot be written.
    """
    with store.writing():
        write_json(folder / "recipe.json", with_absolute_paths(plan.recipe))
        write_json(folder / "plan.json", [_step_json(step) for step in plan.steps])


def write_report(
    store: Store, folder: Path, report: dict[str, Any], outcomes: Mapping[str, Outcome], started: str
) -> None:
    """Write report, times, versions, and links to the artifacts into a run's folder.

    Args:
        store: the store that the folder belongs to.
        folder: the run's folder.
        report: what `make_report` returned.
        outcomes: the artifacts of the run's steps, by step.
        started: when the run started, in ISO 8601.

    Raises:
        StoreError: when it cannot be written.
    """
    links = {name: f"../../artifacts/{outcome.folder.name}" for name, outcome in outcomes.items()}
    with store.writing():
        write_json(folder / "report.json", report)
        (folder / "report.md").write_text(report_markdown(report), "utf-8")
        content = {"started": started, "finished": now(), "versions": versions(), "artifacts": links}
        write_json(folder / "run.json", content)


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "fingerprint": step.fingerprint,
        "code": core_digest(step.stage),
        "inputs": dict(step.inputs),
        "components": {kind: component.identity for kind, component in step.components.items()},
        "estimate": dataclasses.asdict(step.estimate),
    }
