"""The bridge to gptqmodel: really installed, listed and planned with, without gptqmodel being imported.

What it computes is tested in gptqmodel's own environment by the slow tests.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "plugins" / "sqft-gptqmodel"


@pytest.mark.slow  # test_ria.py is of the same kind
def test_a_foreign_quantizer_is_swapped_in_by_pip(call: Any, raw: dict[str, Any], tmp_path: Path) -> None:
    assert sum(len((SOURCE / f).read_text().splitlines()) for f in ("pyproject.toml", "sqft_gptqmodel.py")) < 100
    for section in ("finetune", "search", "merge", "evaluate"):
        raw.pop(section)
    raw["quantize"] = {"quantizer": {"name": "gptqmodel", "options": {"group_size": 32}}}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    shutil.copytree(SOURCE, tmp_path / "sqft-gptqmodel")  # pip leaves build folders behind
    command = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", str(tmp_path / "sqft-gptqmodel")]
    installed = call(*command)
    assert installed.returncode == 0, installed.stderr
    assert "sqft-gptqmodel 0.1.0" in call("-P", "-m", "sqft", "plugins").stdout
    planned = call("-P", "-m", "sqft", "plan", str(recipe), "--store", str(tmp_path / "store"))
    assert planned.returncode == 0 and "gptqmodel (sqft-gptqmodel 0.1.0)" in planned.stdout, planned.stderr
    raw["quantize"]["quantizer"]["options"]["group_size"] = 64
    recipe.write_text(json.dumps(raw))
    refused = call("-P", "-m", "sqft", "plan", str(recipe), "--store", str(tmp_path / "store"))
    assert refused.returncode == 2 and "32 inputs are not a multiple of group_size 64" in refused.stderr
