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

from sqft.recipe.fields import InputPath, NoEffect, OutputPath, Section, fields_marked, fields_of, section_in
from sqft.recipe.sections import ComponentRef
from sqft.utils.code_digest import digest_files


def fingerprint_of(stage: str, section: Section, **content: Any) -> str:
    """A step's fingerprint, hexadecimal: SHA-256 of its settings, the core's code, and `content`."""
    whole = {"stage": stage, "settings": _settings(section), "code": core_digest(stage), **content}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def _settings(section: Section) -> dict[str, Any]:
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
