"""The runs of a store: folders of `runs/` that say which artifacts each run planned and made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqft.errors import StoreError
from sqft.store.artifacts import Store, name_of


@dataclass(frozen=True)
class RunState:
    """A folder of `runs/`."""

    name: str
    started: str
    """UTC, in ISO 8601."""
    finished: str | None
    steps: Mapping[str, str]
    """The artifact of each step, whether it exists or not."""
    refers: tuple[str, ...]
    """Every artifact that the run has planned or made."""
    problem: str = ""
    """Why the list of artifacts cannot be read, if it cannot."""


@dataclass(frozen=True)
class RunResult:
    """How well the model did that a run measured last; None where that was not measured."""

    configuration: str
    """Which model: "merge", "finetune:maximal", …"""
    accuracy: float | None
    perplexity: float | None
    sparsity: float | None


def read_runs(store: Store) -> tuple[RunState, ...]:
    """Read the folders of all runs of a store."""
    return tuple(map(_read_run, subfolders(store.runs)))


def read_result(folder: Path) -> RunResult | None:
    """Return what the report in a run's folder says of the last model; None when it says nothing, is damaged, or was
    never written."""
    try:
        last = json.loads((folder / "report.json").read_text("utf-8"))["rows"][-1]
        numbers = {name: _number(last.get(name)) for name in ("accuracy", "perplexity", "sparsity")}
        return RunResult(str(last["configuration"]), **numbers)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def check_readable(runs: Iterable[RunState]) -> None:
    """Check that every run says which artifacts it needs, before any is deleted.

    Raises:
        StoreError: naming the first run that does not.
    """
    for run in runs:
        if run.problem:
            raise StoreError(
                f"{run.problem}, so it is not known which artifacts run {run.name} needs; nothing is deleted. "
                "Run its recipe again or delete its folder first"
            )


def find_run(name: str, store: Path) -> tuple[Path, Path]:
    """Return a run's folder and its store; `name` is the folder, its name, or the recipe's (then the newest run).

    Raises:
        StoreError: when there is none; the message lists the runs that there are.
    """
    path = Path(name)
    if (path / "recipe.json").is_file():
        parent = path.resolve().parent
        return path, parent.parent if parent.name == "runs" else store
    runs = [file.parent for file in sorted((store / "runs").glob("*/recipe.json"), key=lambda f: f.stat().st_mtime)]
    matching = [run for run in runs if run.name == name] or [run for run in runs if run.name.rpartition("-")[0] == name]
    if not matching:
        names = ", ".join(run.name for run in runs) or "none"
        raise StoreError(f"there is no run '{name}' in {store}, and no such folder; runs there: {names}")
    return matching[-1], store


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted; none when it does not exist."""
    return sorted(filter(Path.is_dir, folder.iterdir())) if folder.is_dir() else []


def _read_run(folder: Path) -> RunState:
    plan, end = folder / "plan.json", folder / "run.json"
    steps: dict[str, str] = {}
    times: dict[str, Any] = {}
    made: list[str] = []
    file, problem = plan, ""
    try:
        if plan.is_file():
            for step in json.loads(plan.read_text("utf-8")):
                steps[step["name"]] = name_of(step["name"].partition(":")[0], step["fingerprint"])
        file = end
        if end.is_file():
            times = json.loads(end.read_text("utf-8"))
            made = [Path(link).name for link in times["artifacts"].values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{file} is damaged ({type(error).__name__})"
    began = datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat(timespec="seconds")
    times = times if isinstance(times, dict) else {}
    refers = tuple(dict.fromkeys([*steps.values(), *made]))
    return RunState(folder.name, str(times.get("started") or began), times.get("finished"), steps, refers, problem)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
