"""What a store already holds of a recipe that cannot be reused, since other code of sqft made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqft.errors import SqftError
from sqft.planning.fingerprint import core_digest
from sqft.planning.plan import Step
from sqft.recipe.recipe import Recipe
from sqft.recipe.rerun import MEASURED, with_absolute_paths
from sqft.recipe.stages import STAGES
from sqft.store.artifacts import Store
from sqft.store.runs import subfolders


def remade_note(store: Store, recipe: Recipe, missing: Sequence[Step]) -> str:
    """Return a line that says which of the missing steps are made again because sqft's code has changed.

    These are the steps that an earlier run of the same name finished, from the same words of its recipe, under another
    fingerprint and with other code of sqft than now. A version of sqft that did not record its code counts as such.
    Empty when there are none.
    """
    wanted = _content(with_absolute_paths(recipe)) or {}
    for folder in subfolders(store.runs) if missing else ():
        name = folder.name.rpartition("-")[0]
        if recipe.name in (name, f"{name}{MEASURED}"):
            earlier, steps = _content(_read(folder / "recipe.json")) or {}, _steps(folder / "plan.json")
            same = [step for step in missing if _before(step.stage, earlier) == _before(step.stage, wanted)]
            if remade := [step.name for step in same if _is_outdated(store, step, steps.get(step.name, {}))]:
                return (
                    f"made again, since sqft's code has changed since run {folder.name}: {', '.join(remade)}. "
                    f"That run's artifacts are kept until you delete {folder} and call `sqft status --prune`"
                )
    return ""


def _content(raw: Any) -> dict[str, Any] | None:
    """Return a stored recipe's sections with all defaults, as plain data; None when this sqft cannot read it."""
    try:
        return Recipe.parse(raw).model_dump(mode="json") if raw is not None else None
    except SqftError:
        return None


def _before(stage: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a recipe the artifact of a stage is made from: sections up to its own."""
    names = [known.name for known in STAGES]
    return {name: content.get(name) for name in ("model", "seed", "calibration", *names[: names.index(stage) + 1])}


def _is_outdated(store: Store, step: Step, earlier: Mapping[str, Any]) -> bool:
    fingerprint = earlier.get("fingerprint", step.fingerprint)
    if fingerprint == step.fingerprint or earlier.get("code") == core_digest(step.stage):
        return False
    return store.is_complete(step.stage, str(fingerprint))


def _steps(file: Path) -> dict[str, Mapping[str, Any]]:
    """Return the steps of a stored plan by name; none of a file that is not one."""
    steps = _read(file)
    steps = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    return {str(step.get("name")): step for step in steps}


def _read(file: Path) -> Any:
    """Return a JSON file's content; None when it cannot be read."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
