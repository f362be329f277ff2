"""Digests of code: what an edit changes, and what has none."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sqft.utils.code_digest import cells_digest, digest_files, package_digest


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "digested_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("a = 1\n")
    (folder / "inner" / "b.py").write_text("b = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("digested_package", None)


def test_every_file_of_a_package_counts(package: Path) -> None:
    seen = [package_digest("digested_package")]
    (package / "inner" / "b.py").write_text("b = 22\n")
    seen.append(package_digest("digested_package"))
    (package / "c.py").write_text("")
    seen.append(package_digest("digested_package"))
    (package / "c.py").rename(package / "d.py")
    seen.append(package_digest("digested_package"))
    assert len(set(seen)) == 4 and all(len(digest) == 64 for digest in seen)
    (package / "notes.txt").write_text("not code")
    assert package_digest("digested_package") == seen[-1]


def test_an_edit_that_keeps_the_size_counts(package: Path) -> None:
    before, file = package_digest("digested_package"), package / "__init__.py"
    time = file.stat().st_mtime_ns
    file.write_text("a = 2\n")
    os.utime(file, ns=(time + 1, time + 1))
    assert package_digest("digested_package") != before


def test_a_module_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digested_module.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    before = package_digest("digested_module")
    (tmp_path / "other.py").write_text("b = 1\n")
    assert package_digest("digested_module") == before != ""


def test_what_has_no_files_has_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "made_in_memory", ModuleType("made_in_memory"))
    assert package_digest("made_in_memory") == package_digest("no_such_package") == package_digest("sys") == ""


def test_names_and_contents_cannot_be_exchanged(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, names in ((first, ("x", "y")), (second, ("y", "x"))):
        folder.mkdir()
        for name, content in zip(names, ("1", "2"), strict=True):
            (folder / name).write_text(content)
    files = [sorted(folder.iterdir()) for folder in (first, second)]
    assert digest_files(files[0], first) != digest_files(files[1], second)
    assert digest_files(files[0], first) == digest_files(files[0], tmp_path / "a")


CELLS = {
    "helpers": """
from functools import cache
SCALE = 1.5

@cache
def helper(weight):
    return [inner(part) for part in weight]

def inner(part):
    return part
""",
    "class": """
from sqft.api import Scorer

class Mine(Scorer):
    '''Mine.'''
    name = "mine"
    power: int = 2

    @property
    def doubled(self):
        return 2 * self.power

    def score(self, weight, stats):
        return helper(weight) if self.doubled else SCALE
""",
}
RUN = """
import json, linecache, os, sys
from sqft.utils.code_digest import cells_digest
for name, text in json.loads(sys.argv[1]).items():
    file = f"/tmp/ipykernel_{os.getpid()}/{name}.py"  # as Jupyter names a cell, whose text it puts there
    if name != sys.argv[2]:
        linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    exec(compile(text, file, "exec"))
print(cells_digest(Mine))
"""


def digest_of_cells(cell: str = "", old: str = "", new: str = "", without: str = "") -> str:
    """The digest of a class as a notebook has it, after a change of a cell."""
    cells = {name: text.replace(old, new) if name == cell else text for name, text in CELLS.items()}
    assert not cell or cells != CELLS
    words = [sys.executable, "-c", RUN, json.dumps(cells), without]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def test_a_class_of_a_notebook_has_the_same_digest_in_each_process() -> None:
    assert digest_of_cells() == digest_of_cells() != ""


@pytest.mark.parametrize(
    ("cell", "old", "new"),
    [("class", "2 * self", "3 * self"), ("class", "int = 2", "int = 3"), ("helpers", "return part", "return -part")],
)
def test_the_cells_of_a_class_and_of_what_it_calls_count(cell: str, old: str, new: str) -> None:
    assert digest_of_cells(cell, old, new) != digest_of_cells()


def test_a_cell_without_source_leaves_no_digest() -> None:
    assert digest_of_cells(without="class") == digest_of_cells(without="helpers") == ""


def test_what_depends_on_how_a_function_was_called_leaves_no_digest() -> None:
    """Two classes of one cell, made by one function, differ."""

    def made(sign: int) -> type:
        class Made:
            def score(self, weight: int) -> int:
                return sign * weight

        return Made

    class Plain:
        def one(self) -> int:
            return super().__hash__()

    class Other:
        def one(self) -> int:
            return super().__hash__()

    assert cells_digest(made(1)) == cells_digest(made(-1)) == ""
    assert "" != cells_digest(Plain) != cells_digest(Other) != ""
