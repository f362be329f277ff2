"""The folder of a run, `runs/NAME-xxxxxxxx`: recipe, plan, report, and links to the artifacts."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqft.execution.report import report_markdown
from sqft.execution.run import Run, loading_template
from sqft.planning.fingerprint import core_digest
from sqft.planning.plan import Plan, Step
from sqft.recipe.rerun import with_absolute_paths
from sqft.store.artifacts import Store
from sqft.utils.files import write_json
from sqft.utils.resources import versions


def now() -> str:
    """Return the time, UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_folder(store: Store, plan: Plan) -> Path:
    """Return the folder of a plan's runs: a different recipe of the same name has a different fingerprint."""
    return store.runs / f"{plan.recipe.name}-{plan.fingerprint[:8]}"


def make_run_folder(store: Store, plan: Plan) -> Path:
    """Make and return the folder of a plan's runs.

    Raises:
        StoreError: when it cannot be made.
    """
    folder = run_folder(store, plan)
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


def write_report(store: Store, run: Run, started: str) -> None:
    """Write a run's report, times, versions, links to its artifacts and how to load its result into its folder.

    Args:
        store: the store that the folder belongs to.
        run: all steps that are done, of earlier runs of the same plan too: a record only grows.
        started: when this run started, in ISO 8601; the first start is kept.

    Raises:
        StoreError: when it cannot be written.
    """
    links = {name: f"../../artifacts/{outcome.folder.name}" for name, outcome in run.items()}
    content: dict[str, Any] = {"started": _first_start(run.folder) or started, "finished": now(), "artifacts": links}
    if result := run.result():
        folder = result.resolve()
        content |= {"result": f"../../artifacts/{folder.parent.name}/{folder.name}"}
        content |= {"loading": loading_template(result, run)}
    with store.writing():
        write_json(run.folder / "report.json", run.report)
        (run.folder / "report.md").write_text(report_markdown(run.report), "utf-8")
        write_json(run.folder / "run.json", content | {"versions": versions()})


def _first_start(folder: Path) -> str | None:
    """Return when a run was started first; None when it was not, or its record cannot be read."""
    try:
        return str(json.loads((folder / "run.json").read_text("utf-8"))["started"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "fingerprint": step.fingerprint,
        "code": core_digest(step.stage),
        "inputs": dict(step.inputs),
        "digests": dict(step.digests),
        "components": {kind: component.identity for kind, component in step.components.items()},
        "estimate": dataclasses.asdict(step.estimate),
    }
