"""CONTRIBUTING.md and the layout page name the files and rooms that there are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
WHERE, _, CHANGE = CONTRIBUTING.partition("## To change something")
LAYOUT = (ROOT / "docs" / "explanation" / "layout.md").read_text()
ROOMS = {path.name for path in (ROOT / "sqft").iterdir() if path.is_dir() and path.name != "__pycache__"}
MODULES = {path.stem for path in (ROOT / "sqft").glob("*.py") if not path.stem.startswith("__")}

PROMISED = [
    "a scorer",
    "a quantizer",
    "the effective weight",
    "a recipe option that names a path",
    "a command",
    "resuming",
    "a family of models",
    "an export format",
    "an estimate",
    "a message",
]


def paths(text: str) -> list[str]:
    return [word for word in re.findall(r"`([^`\s]+)`", text) if "/" in word and not word.startswith(".")]


@pytest.mark.parametrize("path", sorted({*paths(CONTRIBUTING)}))
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "sqft" / path).is_dir(), f"CONTRIBUTING.md names {path}"


@pytest.mark.parametrize("subject", PROMISED)
def test_the_table_says_where_to_change(subject: str) -> None:
    row = next(line for line in CHANGE.splitlines() if line.startswith(f"| {subject}"))
    _, _, code, test, _ = row.split("|")
    assert any(path.startswith(("sqft/", "plugins/")) for path in paths(code)), row
    assert any(path.startswith("tests/") for path in paths(test)), row


def test_every_room_is_named() -> None:
    assert {word.rstrip("/") for word in re.findall(r"`(\w+)/`", WHERE)} >= ROOMS
    assert {f"`{name}.py`" for name in MODULES} <= set(re.findall(r"`\w+\.py`", WHERE))
    assert set(re.findall(r"^\| `(\w+)` \|", LAYOUT, re.MULTILINE)) == ROOMS | MODULES


def test_the_layout_page_has_the_import_rules() -> None:
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "tests" / "test_architecture.py")
    assert spec and spec.loader
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    stated = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", LAYOUT, re.MULTILINE))
    rules = {room: ", ".join(allowed.split()) or "nothing" for room, allowed in architecture.ROOMS.items()}
    assert stated == {room: rule for room, rule in rules.items() if not room.startswith("__")}
