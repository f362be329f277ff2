"""What a store holds: its runs, its artifacts, and which of them no run needs any more."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sqft.errors import ArtifactError, StoreError
from sqft.store.artifacts import INCOMPLETE_PREFIX, Store
from sqft.store.runs import RunResult, RunState, check_readable, read_result, read_runs, subfolders
from sqft.utils.files import MANIFEST, size_of
from sqft.utils.text import human_size

ARTIFACT_NAME = re.compile(r"([a-z]+)-([0-9a-f]{12})")
"""The name of an artifact's folder: stage and start of its fingerprint."""
NOT_MEASURED = RunResult("–", None, None, None)


@dataclass(frozen=True)
class ArtifactStatus:
    """A folder of `artifacts/`."""

    folder: Path
    name: str
    stage: str
    fingerprint: str
    """Of full length where the manifest says it, or the 12 digits of the folder's name."""
    state: Literal["complete", "damaged", "unfinished"]
    problem: str
    size: int
    """Bytes on disk."""
    changed: float
    """Seconds since 1970."""
    runs: tuple[str, ...]
    """The runs that need it."""
    in_work: bool
    """Whether a run makes it, or opens it."""
    in_use: bool
    """Whether a run that has not ended made it or depends on it."""

    @property
    def busy(self) -> Literal["", "being made", "in use"]:
        """What a run does with it at this moment."""
        if self.in_work and self.state == "unfinished":
            return "being made"
        return "in use" if self.in_work or self.in_use else ""

    @property
    def kept(self) -> str:
        """Why it may not be deleted: a run is busy with it, or it is finished and runs need it; else empty."""
        if self.busy:
            return f"{self.busy} at this moment"
        if self.state == "unfinished" or not self.runs:
            return ""
        return f"needed by {', '.join(self.runs)}"

    @property
    def prunable(self) -> bool:
        return not self.kept


@dataclass(frozen=True)
class StoreStatus:
    """A store's runs and artifacts, by name."""

    root: Path
    runs: tuple[RunState, ...]
    results: Mapping[str, RunResult]
    """Of the runs that have ended and whose report can be read, by their names."""
    artifacts: tuple[ArtifactStatus, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return total(self.artifacts)

    @property
    def prunable(self) -> list[ArtifactStatus]:
        """The artifacts that may be deleted."""
        return [artifact for artifact in self.artifacts if artifact.prunable]

    def completed_steps(self, run: RunState) -> dict[str, bool]:
        """Return each step of a run, and whether its artifact exists and is undamaged."""
        complete = {artifact.name for artifact in self.artifacts if artifact.state == "complete"}
        return {step: name in complete for step, name in run.steps.items()}

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "store": str(self.root),
            "size": self.size,
            "runs": [
                asdict(run)
                | {
                    "completed": self.completed_steps(run),
                    "result": asdict(self.results[run.name]) if run.name in self.results else None,
                }
                for run in self.runs
            ],
            "artifacts": [
                {**asdict(one), "folder": str(one.folder), "prunable": one.prunable, "kept": one.kept}
                for one in self.artifacts
            ],
            "prunable": total(self.prunable),
        }

    def runs_table(self) -> tuple[list[str], list[list[str]]]:
        """Return heads and rows of the table of runs."""
        cells = []
        for run in self.runs:
            steps = self.completed_steps(run)
            missing = [step for step, complete in steps.items() if not complete]
            done = f"{len(steps) - len(missing)} of {len(steps)}" + (f"; not {', '.join(missing)}" if missing else "")
            result = self.results.get(run.name, NOT_MEASURED)
            measured = [
                result.configuration,
                _text(result.accuracy, "{:.1%}"),
                _text(result.perplexity, "{:.2f}"),
                _text(result.sparsity, "{:.2%}"),
            ]
            cells.append([run.name, run.started, run.finished or "–", *measured, run.problem or done])
        heads = ["run", "started", "finished", "last model", "accuracy", "perplexity", "sparsity", "steps complete"]
        return heads, cells

    def artifacts_table(self, now: float | None = None) -> tuple[list[str], list[list[str]]]:
        """Return heads and rows of the table of artifacts."""
        cells = []
        for artifact in self.artifacts:
            state = ", ".join(filter(None, (artifact.problem or artifact.state, artifact.busy)))
            cells.append(
                [
                    artifact.stage,
                    artifact.fingerprint[:12],
                    state,
                    human_size(artifact.size),
                    age((now or time.time()) - artifact.changed),
                    ", ".join(artifact.runs) or "none",
                ]
            )
        return ["stage", "fingerprint", "state", "size", "age", "used by"], cells


def total(artifacts: Iterable[ArtifactStatus]) -> int:
    """Return the bytes on disk of all of them."""
    return sum(artifact.size for artifact in artifacts)


def age(seconds: float) -> str:
    """Return a duration in its largest unit."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def _text(value: float | None, form: str) -> str:
    return form.format(value) if value is not None else "–"


def scan_store(store: Store) -> StoreStatus:
    """Look through a store. Nothing is changed, and only manifests and the runs' own files are read.

    Raises:
        StoreError: when there is no store.
    """
    if not (store.artifacts.is_dir() or store.runs.is_dir()):
        raise StoreError(f"there is no store in {store.root}; `sqft run` makes one, --store names another")
    runs = read_runs(store)
    users: dict[str, list[str]] = {}
    for run in runs:
        for name in run.refers:
            users.setdefault(name, []).append(run.name)
    states = (_artifact_status(store, folder, users) for folder in subfolders(store.artifacts))
    artifacts = sorted((state for state in states if state), key=lambda state: (state.name, state.folder.name))
    results = {run.name: result for run in runs if run.finished and (result := read_result(store.runs / run.name))}
    return StoreStatus(store.root, runs, results, tuple(artifacts))


def prune(store: Store, artifacts: Sequence[ArtifactStatus]) -> list[ArtifactStatus]:
    """Delete these artifacts, except those that a run has begun to need meanwhile; return the deleted ones.

    Raises:
        StoreError: when a run's list of artifacts cannot be read. Nothing is deleted then.
    """
    check_readable(read_runs(store))
    return [artifact for artifact in artifacts if store.remove(artifact.folder, partial(_is_needed, store, artifact))]


def _is_needed(store: Store, artifact: ArtifactStatus) -> bool:
    """Return whether a run needs a finished artifact now.

    Called under the artifact's lock: a run writes down what it needs before it takes any lock.
    """
    runs = read_runs(store)
    check_readable(runs)
    return artifact.state != "unfinished" and any(artifact.name in run.refers for run in runs)


def _artifact_status(store: Store, folder: Path, users: Mapping[str, Sequence[str]]) -> ArtifactStatus | None:
    """Return the state of a folder; None when it is not an artifact's."""
    name = INCOMPLETE_PREFIX.sub("", folder.name)
    match = ARTIFACT_NAME.fullmatch(name)
    if match is None:
        return None
    stage, fingerprint, problem = match[1], match[2], ""
    state: Literal["complete", "damaged", "unfinished"] = "complete" if name == folder.name else "unfinished"
    changed = folder
    if state == "complete":
        changed = folder / MANIFEST
        fingerprint = _full_fingerprint(changed, fingerprint)
        try:
            if store.find(stage, fingerprint) is None:
                return None  # deleted since it was listed
        except ArtifactError as error:
            state, problem = "damaged", str(error)
    elif folder.name.startswith(".gone-"):
        problem = "deleted in part"
    try:
        size = size_of(folder)
        when = (changed if changed.exists() else folder).stat().st_mtime
    except OSError:  # a run changes it while we look
        size, when = 0, time.time()
    return ArtifactStatus(
        folder,
        name,
        stage,
        fingerprint,
        state,
        problem,
        size,
        when,
        tuple(users.get(name, ())),
        store.is_being_made(name),
        store.is_used(name),
    )


def _full_fingerprint(manifest: Path, start: str) -> str:
    """Return the fingerprint in a manifest if it begins as the folder's name says, else that beginning."""
    try:
        fingerprint = json.loads(manifest.read_text("utf-8"))["fingerprint"]
        return fingerprint if isinstance(fingerprint, str) and fingerprint.startswith(start) else start
    except (OSError, ValueError, LookupError, TypeError):
        return start
