"""What other evaluations of a store have measured already: the same of the same model, in the same way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqft.errors import ArtifactError, StoreError
from sqft.planning.plan import Step
from sqft.store.artifacts import Artifact, Store
from sqft.utils.files import CHECKPOINTS, MANIFEST, write_json
from sqft.utils.resources import versions

EVALUATE, RESULTS = "evaluate", "results.json"
BEGUN = "measured-so.json"
"""Says, while an evaluation is made, what it measures, with which packages and on which device."""


def made_of(inputs: Mapping[str, Path]) -> dict[str, str]:
    """Return a digest of all that is in each input's folder: a step that was made again may not come out the same."""
    manifests = {role: json.loads((folder / MANIFEST).read_text("utf-8")) for role, folder in inputs.items()}
    return {
        role: hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
        for role, manifest in manifests.items()
    }


def take_earlier(
    store: Store, step: Step, scratch: Path, inputs: Mapping[str, Path], device: str, anew: bool = False
) -> dict[str, str]:
    """Put what finished evaluations have measured into the folder of one that begins, as if it had measured that.

    The newest that has a measurement gives it: of the same files, with the same packages, on the same device. What an
    earlier attempt has left stays where it was measured so, too, and then nothing is taken; otherwise it is deleted.

    Args:
        store: the step's.
        step: one that is to be made.
        scratch: the folder in which it is made, whose lock is held.
        inputs: the folders that it measures, by role.
        device: the torch device that it would measure on.
        anew: whether to take nothing.

    Returns:
        The artifact that gave a measurement, by the measurement's name; empty for another stage.
    """
    origins: dict[str, str] = {}
    if not step.measurements:
        return origins
    measured_so = {"made_of": made_of(inputs), "versions": versions(), "device": device}
    with store.writing():
        _begin(scratch, {**measured_so, "lm_eval": version("lm_eval")})
    if anew or (scratch / RESULTS).exists():
        return origins
    results: dict[str, Any] = {}
    for fingerprint, made in _evaluations(store, measured_so):
        same = {name: made[one] for name, one in step.measurements.items() if name not in origins and one in made}
        if not same:
            continue
        with store.using(EVALUATE, fingerprint):
            if artifact := _intact(store, fingerprint):
                taken = [name for name, theirs in same.items() if _take(artifact, theirs, name, results, scratch)]
                origins |= dict.fromkeys(taken, artifact.folder.name)
    first = next(iter(step.measurements))
    if first in results.get("texts", {}):
        results["perplexity"] = {name: results["texts"][first][name] for name in ("perplexity", "nll", "tokens")}
    if origins:
        write_json(scratch / RESULTS, results | {"earlier": origins})
    return origins


def _begin(scratch: Path, measured_so: Mapping[str, Any]) -> None:
    """Empty the folder of an evaluation, unless what is there was measured so; and write down how it is measured."""
    begun = scratch / CHECKPOINTS / BEGUN
    with suppress(OSError, ValueError):
        if json.loads(begun.read_text("utf-8")) == measured_so:
            return
    for left in scratch.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    begun.parent.mkdir()
    write_json(begun, measured_so)


def _evaluations(store: Store, same: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the fingerprint of each finished evaluation whose manifest says the same, the newest first, and its
    measurements' names by theirs."""
    found: list[tuple[float, str, dict[str, str]]] = []
    for file in store.artifacts.glob(f"{EVALUATE}-*/{MANIFEST}"):
        # Deleted meanwhile, damaged, or of a version that did not record them: then it is measured.
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            manifest = json.loads(file.read_text("utf-8"))
            made = {fingerprint: name for name, fingerprint in manifest["measurements"].items()}
            if all(manifest[name] == value for name, value in same.items()):
                found.append((file.stat().st_mtime, manifest["fingerprint"], made))
    for _, fingerprint, made in sorted(found, key=lambda one: one[0], reverse=True):
        yield fingerprint, made


def _intact(store: Store, fingerprint: str) -> Artifact | None:
    try:
        if artifact := store.find(EVALUATE, fingerprint):
            store.verify(artifact)
        return artifact
    except (ArtifactError, StoreError, OSError):
        return None


def _take(artifact: Artifact, theirs: str, name: str, results: dict[str, Any], scratch: Path) -> bool:
    """Add one measurement of an artifact to the results, with its answers; return whether it can be told apart."""
    report = artifact.report
    if theirs in report.get("texts", {}):
        results.setdefault("texts", {})[name] = report["texts"][theirs]
        return True
    if theirs == "exact_match":
        results[theirs] = report[theirs]
        _copy(artifact, "predictions.jsonl", scratch)
        return True
    task, asked = theirs.removeprefix("tasks."), report["lm_eval"]
    own = asked["names"][task]
    before = results.get("lm_eval", {"names": {}, "tasks": {}})
    parts = [*(parts for other, parts in asked["names"].items() if other != task), *before["names"].values()]
    others = {one for of_task in parts for one in of_task}
    if asked["lm_eval"] != version("lm_eval") or others & set(own):
        return False
    results["tasks"] = results.get("tasks", {}) | {one: report["tasks"][one] for one in own}
    results["lm_eval"] = asked | {
        "names": before["names"] | {task: own},
        "tasks": before["tasks"] | {one: asked["tasks"][one] for one in own if one in asked["tasks"]},
    }
    for one in own:
        _copy(artifact, f"samples/{one.replace('/', '_')}.jsonl", scratch)
    return True


def _copy(artifact: Artifact, name: str, scratch: Path) -> None:
    if name in artifact.manifest["files"]:
        (scratch / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(artifact.folder / name, scratch / name)
