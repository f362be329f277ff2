"""Where the caches go when there is no home to write to."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sqft.utils.caches import use_writable_caches

VARIABLES = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH")


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """None of the variables is set, and what is set in a test is undone."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def found() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def unknown_user(_: int) -> Any:
    raise KeyError("getpwuid(): uid not found: 54321")


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME", "HF_HOME"])
def test_a_folder_that_can_be_written_stays(name: str, no_settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_settings.setenv(name, str(tmp_path / "mine"))
    use_writable_caches(tmp_path / "cache")
    assert found() == {name: str(tmp_path / "mine")}


def test_a_user_without_a_home(no_settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_settings.setattr(pwd, "getpwuid", unknown_user)
    no_settings.chdir(tmp_path)
    use_writable_caches(Path("cache"))
    assert found() == {"HF_HOME": str(tmp_path / "cache")}


def test_a_home_that_cannot_be_made(no_settings: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its parent may be written, by its mode, and still takes no folder."""

    def refuse(**_: Any) -> Any:
        raise OSError("no")

    no_settings.setenv("HOME", str(tmp_path / "none"))
    no_settings.setattr("sqft.utils.caches.TemporaryDirectory", refuse)
    use_writable_caches(tmp_path / "cache")
    assert found() == {"HOME": str(tmp_path / "none"), "HF_HOME": str(tmp_path / "cache")}


@pytest.mark.parametrize("locked", ["", "datasets"])
def test_what_lies_in_a_read_only_home_stays_in_use(
    locked: str, no_settings: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / ".cache" / "huggingface"
    for name in ("hub", "datasets"):
        (home / name).mkdir(parents=True)
    (home / "token").write_text("x")
    no_settings.setenv("HOME", str(tmp_path))
    no_settings.setattr(os, "access", lambda path, mode: Path(path) != home / locked)
    use_writable_caches(tmp_path / "cache")
    kept = {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
    assert found() == {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "cache"), **kept}


TASK = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["x"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_a_run_without_a_home(model_folder: Path, data: Path, tmp_path: Path) -> None:
    """With an lm-eval task, whose data set `datasets` keeps: below the store, and not in a folder called "~"."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.replace("DATA", str(data / "test.jsonl")))
    recipe = {"name": "x", "model": {"path": str(model_folder)}}
    recipe["evaluate"] = {"of": ["model"], "tasks": ["sums"], "include_path": "tasks"}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    code = (
        "import pwd\ndef unknown(_): raise KeyError('no such user')\npwd.getpwuid = unknown\n"
        "from sqft.cli import main\nmain(['run', 'r.json'])"
    )
    left = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=left, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout and "sums: no version, 0-shot, 10 of 10 documents" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "store", "tasks"]
    assert (tmp_path / "store" / "cache" / "datasets").is_dir()
