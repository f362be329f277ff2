"""What a store holds: its runs, its artifacts, and which of them nobody needs any more."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal
from sqft.errors import ArtifactError, SqftError
from sqft.utils.text import human
from sqft.store.artifacts import LEFT, MANIFEST, Store, name_of


NAME = re.compile(r"([a-z]+)-([0-9a-f]{12})")


@dataclass(frozen=True)
class RunState:
    """A folder of `runs/`."""

    name: str
    started: str
    """UTC, as ISO 8601 writes it."""
    finished: str | None
    steps: Mapping[str, str]
    """The artifact that each step leads to, whether it stands or not."""
    refers: tuple[str, ...]
    """Every artifact that the run has planned or made."""
    problem: str = ""
    """Why it cannot be read what the run refers to."""


@dataclass(frozen=True)
class ArtifactStatus:
    """A folder of `artifacts/`."""

    folder: Path
    name: str
    stage: str
    fingerprint: str
    """Whole where the manifest says it, or the 12 digits of the folder's name."""
    state: Literal["whole", "damaged", "unfinished"]
    problem: str
    size: int
    """Bytes on disk."""
    changed: float
    """Seconds since 1970."""
    runs: tuple[str, ...]
    in_work: bool
    """Whether a run makes it, or opens it."""
    in_use: bool
    """Whether a run that has not ended made it or builds on it."""

    @property
    def busy(self) -> Literal["", "being made", "in use"]:
        """What a run does with it at this moment."""
        if self.in_work and self.state == "unfinished":
            return "being made"
        return "in use" if self.in_work or self.in_use else ""

    @property
    def kept(self) -> str:
        """Why it may not be deleted: a run is busy with it, or it was finished and runs refer to it; else empty."""
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
    artifacts: tuple[ArtifactStatus, ...]

    @property
    def size(self) -> int:
        return total(self.artifacts)

    @property
    def prunable(self) -> list[ArtifactStatus]:
        return [held for held in self.artifacts if held.prunable]

    def completed_steps(self, run: RunState) -> dict[str, bool]:
        """Each step of a run, and whether its artifact is there whole."""
        whole = {held.name for held in self.artifacts if held.state == "whole"}
        return {step: name in whole for step, name in run.steps.items()}

    def as_json(self) -> dict[str, Any]:
        return {
            "store": str(self.root),
            "size": self.size,
            "runs": [asdict(run) | {"standing": self.completed_steps(run)} for run in self.runs],
            "artifacts": [
                {**asdict(held), "folder": str(held.folder), "prunable": held.prunable, "kept": held.kept}
                for held in self.artifacts
            ],
            "prunable": total(self.prunable),
        }

    def runs_table(self) -> tuple[list[str], list[list[str]]]:
        cells = []
        for run in self.runs:
            steps = self.completed_steps(run)
            missing = [step for step, stands in steps.items() if not stands]
            stand = f"{len(steps) - len(missing)} of {len(steps)}" + (f"; not {', '.join(missing)}" if missing else "")
            cells.append([run.name, run.started, run.finished or "–", run.problem or stand])
        return ["run", "started", "finished", "steps that stand"], cells

    def artifacts_table(self, now: float | None = None) -> tuple[list[str], list[list[str]]]:
        cells = []
        for held in self.artifacts:
            state = ", ".join(filter(None, (held.problem or held.state, held.busy)))
            cells.append(
                [
                    held.stage,
                    held.fingerprint[:12],
                    state,
                    human(held.size),
                    age((now or time.time()) - held.changed),
                    ", ".join(held.runs) or "none",
                ]
            )
        return ["stage", "fingerprint", "state", "size", "age", "used by"], cells


def total(artifacts: Iterable[ArtifactStatus]) -> int:
    return sum(held.size for held in artifacts)


def age(seconds: float) -> str:
    """A time as people say it, in its largest unit."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def scan_store(store: Store) -> StoreStatus:
    """Look through a store. Nothing is changed, and no file but manifests and runs' own is read.

    Raises:
        SqftError: when there is no store.
    """
    if not (store.artifacts.is_dir() or store.runs.is_dir()):
        raise SqftError(f"there is no store in {store.root}; `sqft run` makes one, --store names another")
    runs = tuple(map(_run, _folders(store.runs)))
    users: dict[str, list[str]] = {}
    for run in runs:
        for name in run.refers:
            users.setdefault(name, []).append(run.name)
    found = (_held(store, folder, users) for folder in _folders(store.artifacts))
    artifacts = sorted((held for held in found if held), key=lambda held: (held.name, held.folder.name))
    return StoreStatus(store.root, runs, tuple(artifacts))


def prune(store: Store, artifacts: Sequence[ArtifactStatus]) -> list[ArtifactStatus]:
    """Delete these artifacts, but for those that a run has come to need or work on meanwhile; what was deleted.

    Raises:
        SqftError: when it cannot be read what some run refers to. Nothing is deleted then.
    """
    _check_runs(scan_store(store).runs)
    return [held for held in artifacts if store.remove(held.folder, partial(_needed, store, held))]


def _needed(store: Store, held: ArtifactStatus) -> bool:
    """Asked under the artifact's lock: a run says what it refers to before it takes any lock."""
    runs = tuple(map(_run, _folders(store.runs)))
    _check_runs(runs)
    return held.state != "unfinished" and any(held.name in run.refers for run in runs)


def _check_runs(runs: Iterable[RunState]) -> None:
    for run in runs:
        if run.problem:
            raise SqftError(
                f"{run.problem}, so nobody knows what run {run.name} refers to; run its recipe again or delete its "
                "folder, and nothing is deleted before"
            )


def _run(folder: Path) -> RunState:
    plan, ended = folder / "plan.json", folder / "run.json"
    steps: dict[str, str] = {}
    times: dict[str, Any] = {}
    made: list[str] = []
    place, problem = plan, ""
    try:
        if plan.is_file():
            for step in json.loads(plan.read_text("utf-8")):
                steps[step["name"]] = name_of(step["name"].partition(":")[0], step["fingerprint"])
        place = ended
        if ended.is_file():
            times = json.loads(ended.read_text("utf-8"))
            made = [Path(link).name for link in times["artifacts"].values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{place} is damaged ({type(error).__name__})"
    began = datetime.fromtimestamp(folder.stat().st_mtime, UTC).isoformat(timespec="seconds")
    times = times if isinstance(times, dict) else {}
    refers = tuple(dict.fromkeys([*steps.values(), *made]))
    return RunState(folder.name, str(times.get("started") or began), times.get("finished"), steps, refers, problem)


def _held(store: Store, folder: Path, users: Mapping[str, Sequence[str]]) -> ArtifactStatus | None:
    """A folder as it is; None when it is no artifact's."""
    name = LEFT.sub("", folder.name)
    match = NAME.fullmatch(name)
    if match is None:
        return None
    stage, fingerprint, problem = match[1], match[2], ""
    state: Literal["whole", "damaged", "unfinished"] = "whole" if name == folder.name else "unfinished"
    changed = folder
    if state == "whole":
        changed = folder / MANIFEST
        fingerprint = _whole_fingerprint(changed, fingerprint)
        try:
            if store.find(stage, fingerprint) is None:
                return None  # deleted since it was listed
        except ArtifactError as error:
            state, problem = "damaged", str(error)
    elif folder.name.startswith(".gone-"):
        problem = "deleted in part"
    try:
        size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
        when = (changed if changed.exists() else folder).stat().st_mtime
    except OSError:  # a run moves on while we look
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
        store.is_held(name),
        store.is_used(name),
    )


def _whole_fingerprint(manifest: Path, start: str) -> str:
    """The fingerprint in a manifest, if it is the folder's."""
    try:
        found = json.loads(manifest.read_text("utf-8"))["fingerprint"]
        return found if isinstance(found, str) and found.startswith(start) else start
    except (OSError, ValueError, LookupError, TypeError):
        return start


def _folders(place: Path) -> list[Path]:
    return sorted(filter(Path.is_dir, place.iterdir())) if place.is_dir() else []
