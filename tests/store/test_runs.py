"""The runs of a store: found by name, and read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sqft.errors import StoreError
from sqft.store.runs import find_run


def test_runs_by_name(tmp_path: Path) -> None:
    for age, name in enumerate(("tiny-00000000", "tiny-ffffffff", "tiny-2-00000000", "tiny.eval-00000000")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text("{}")
        os.utime(folder / "recipe.json", (1000 - age, 1000 - age))
    assert find_run("tiny", tmp_path)[0].name == "tiny-00000000"  # the newest
    assert find_run("tiny-ffffffff", tmp_path)[0].name == "tiny-ffffffff"
    assert find_run("tiny-2", tmp_path)[0].name == "tiny-2-00000000"
    assert find_run(str(tmp_path / "runs" / "tiny-ffffffff"), Path("other"))[1] == tmp_path
    with pytest.raises(StoreError, match="runs there: tiny"):
        find_run("t", tmp_path)
