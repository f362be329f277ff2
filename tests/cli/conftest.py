"""A recipe file for the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def recipe(raw: dict[str, Any], tmp_path: Path) -> Path:
    raw["evaluate"]["of"] = ["sparsify", "merge"]
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(raw))
    return file
