"""What a store already holds of a recipe that cannot be reused, since other code of sqft made it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqft.planning.fingerprint import core_digest
from sqft.planning.plan import Step
from sqft.recipe.recipe import Recipe
from sqft.recipe.rerun import with_absolute_paths
from sqft.store.artifacts import Store
from sqft.store.runs import subfolders


def remade_note(store: Store, recipe: Recipe, missing: Sequence[Step]) -> str:
    """Return a line that says which of the missing steps are made again because sqft's code has changed.

    These are the steps that an earlier run of the same recipe finished under another fingerprint, with other code of
    sqft than now; a version of sqft that did not record its code counts as such. Empty when there are none.
    """
    stored = with_absolute_paths(recipe)
    for folder in subfolders(store.runs) if missing else ():
        if folder.name.rpartition("-")[0] == recipe.name and _read(folder / "recipe.json") == stored:
            earlier = {step["name"]: step for step in _read(folder / "plan.json") or ()}
            if remade := [step.name for step in missing if _is_outdated(store, step, earlier.get(step.name, {}))]:
                return (
                    f"made again, since sqft's code has changed since run {folder.name}: {', '.join(remade)}. "
                    f"That run's artifacts are kept until you delete {folder} and call `sqft status --prune`"
                )
    return ""


def _is_outdated(store: Store, step: Step, earlier: Mapping[str, Any]) -> bool:
    fingerprint = earlier.get("fingerprint", step.fingerprint)
    if fingerprint == step.fingerprint or earlier.get("code") == core_digest(step.stage):
        return False
    return store.is_complete(step.stage, fingerprint)


def _read(file: Path) -> Any:
    """Return a JSON file's content; None when it cannot be read."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
