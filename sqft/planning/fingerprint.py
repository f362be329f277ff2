"""What a step's result depends on, as data to take a digest of.

Settings, components and their code, the content of models and data, the inputs' fingerprints and the
seed. Left out is what the result does not depend on: the recipe's name, paths, device, logging.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from sqft.recipe.fields import Section
from sqft.recipe.sections import ComponentRef
from sqft.utils.code_digest import digest_files

WITHOUT_EFFECT = {"save_every", "report_to", "logging_dir"}
"""Settings that change when work is saved and who hears of it, not what comes out."""


def fingerprint_of(stage: str, section: Section, **content: Any) -> str:
    """A step's fingerprint, hexadecimal: SHA-256 of its settings, the core's code, and `content`."""
    whole = {"stage": stage, "settings": _settings(section), "code": core_digest(stage), **content}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def _settings(section: Section) -> dict[str, Any]:
    """A section without its components (they enter as parts), its paths (as content) and what has no effect."""
    settings = section.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    for name in [name for name in type(section).model_fields if isinstance(getattr(section, name), ComponentRef)]:
        settings.pop(name)
    return {name: _without_paths(value) for name, value in settings.items() if name not in ("of", "include_path")}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items() if key not in ("path", "text")}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    return value


@cache
def core_digest(stage: str) -> str:
    """Digest of the core's own code that a stage's result depends on."""
    root = Path(__file__).parents[1]
    files = [root / "stages" / f"{name}.py" for name in (stage, "inputs", "compress", "adapted", "training_arguments")]
    files += [root / f"{name}.py" for name in ("types", "components/kinds", "components/checks", "planning/plan")]
    for room in ("kernels", "modeling", "data", "checkpoints"):
        files += sorted((root / room).rglob("*.py"))
    return digest_files([file for file in files if file.is_file()], root)
