"""What a step's result depends on, as data to take a digest of.

Settings, components and their code, the content of models and data, the inputs' fingerprints and the
seed. Left out is what the result does not depend on: the recipe's name, paths, device, logging.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sqft.planning.plan import Step
from sqft.recipe.fields import InputPath, NoEffect, OutputPath, Section, fields_marked, fields_of, section_in
from sqft.recipe.recipe import Recipe
from sqft.recipe.sections import ComponentRef
from sqft.utils.code_digest import digest_files


def fingerprint_of(step: Step, recipe: Recipe, model: str, before: Mapping[str, Step]) -> str:
    """Return a step's fingerprint: SHA-256, hexadecimal, of all that its result depends on.

    Args:
        step: with the digests of its files.
        recipe: its seed and model section count, and the calibration that the step reads.
        model: digest of the recipe's own model.
        before: the steps that it reads, with their fingerprints, by name.
    """
    content: dict[str, Any] = {
        "stage": step.stage,
        "settings": settings_of(step.section),
        "code": core_digest(step.stage),
        "components": {kind: component.identity for kind, component in step.components.items()},
        "inputs": {role: before[name].fingerprint for role, name in step.inputs.items()},
        "files": dict(step.digests),
        "model": [model, recipe.model.dtype, recipe.model.trust_remote_code],
        "seed": recipe.seed,
    }
    if "calibration" in step.files and recipe.calibration:
        content["calibration"] = settings_of(recipe.calibration)
    if "finetune" in step.inputs:  # the adapter's and the merger's code runs again
        components = before[step.inputs["finetune"]].components
        content["adapter_code"] = {kind: component.registration.code for kind, component in components.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def settings_of(section: Section) -> dict[str, Any]:
    """Return a section without its components (they enter as parts), its paths (as content) and what has no effect."""
    settings = section.model_dump(mode="json", by_alias=True)
    for name, field in fields_of(type(section)).items():
        if section_in(field) is ComponentRef:
            settings.pop(name)
    for marked in list(fields_marked(type(section), (InputPath, OutputPath, NoEffect), settings)):
        marked.holder.pop(marked.key, None)
    return settings


@cache
def core_digest(stage: str) -> str:
    """Digest of the core's own code that a stage's result depends on."""
    root = Path(__file__).parents[1]
    files = [root / "stages" / f"{name}.py" for name in (stage, "inputs", "compress", "adapted", "training_arguments")]
    files += [root / f"{name}.py" for name in ("types", "components/kinds", "components/checks", "planning/plan")]
    for room in ("kernels", "modeling", "data", "checkpoints"):
        files += sorted((root / room).rglob("*.py"))
    return digest_files([file for file in files if file.is_file()], root)
