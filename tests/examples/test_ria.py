"""A stranger's scorer: really installed, named in a recipe, uninstalled, and then missed with the right words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sqft-ria"


def test_install_use_uninstall(call: Any, raw: dict[str, Any], tmp_path: Path) -> None:
    for section in ("finetune", "search", "merge", "evaluate"):
        raw.pop(section)
    raw["sparsify"]["scorer"] = {"name": "ria", "options": {"power": 0.25}}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    source = tmp_path / "sqft-ria"  # pip leaves build folders behind
    source.mkdir()
    for file in ("pyproject.toml", "sqft_ria.py"):
        (source / file).write_text((EXAMPLE / file).read_text())
    command = ["-m", "sqft", "run", str(recipe), "--store", str(tmp_path / "store")]
    installed = call("-m", "pip", "install", "--no-deps", "--no-build-isolation", str(source))
    assert installed.returncode == 0, installed.stderr
    assert "sqft-ria 0.3" in call("-m", "sqft", "plugins").stdout
    used = call(*command)
    assert used.returncode == 0, used.stderr
    (manifest,) = (tmp_path / "store" / "artifacts").glob("sparsify-*/manifest.json")
    scorer = json.loads(manifest.read_text())["components"]["scorer"]
    assert scorer["provider"] == "sqft-ria 0.3" and scorer["options"] == {"power": 0.25}
    removed = call("-m", "pip", "uninstall", "-y", "sqft-ria")
    assert removed.returncode == 0, removed.stderr
    missed = call(*command)
    assert missed.returncode == 2
    assert (
        "sparsify.scorer: no scorer named 'ria'; installed: magnitude, mask, random, sparsegpt, wanda." in missed.stderr
    )


def test_it_is_small_and_keeps_the_contract() -> None:
    lines = [line for file in ("pyproject.toml", "sqft_ria.py") for line in (EXAMPLE / file).read_text().splitlines()]
    assert len(lines) < 60
    code = "from sqft_ria import Ria; from sqft.testing import check_scorer; check_scorer(Ria())"
    done = subprocess.run([sys.executable, "-c", code], cwd=EXAMPLE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
