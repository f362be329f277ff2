"""Digests of files and folders, and what is remembered of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.errors import SqftError
from sqft.utils.digests import Digests


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqft.utils.digests.SETTLED", 0)


def plant(memory: Path) -> None:
    """Replace what is remembered, to see whether it is what is answered."""
    memory.write_text(json.dumps(dict.fromkeys(json.loads(memory.read_text()), "planted")))


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    memory, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_bytes(b"abc")
    assert Digests(memory).file(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    plant(memory)
    assert Digests(memory).file(file) == "planted"


def in_place(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(b"x")


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"xbc")
    os.replace(other, file)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", [in_place, replaced])
def test_a_changed_file_is_read_again_whatever_its_time_says(tmp_path: Path, change: Callable[[Path], None]) -> None:
    memory, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_bytes(b"abc")
    times, before = file.stat(), Digests(memory).file(file)
    plant(memory)
    change(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Digests(memory).file(file) not in (before, "planted")


def test_a_file_that_has_just_changed_is_not_trusted(tmp_path: Path) -> None:
    """A change within one tick of the clock shows nowhere but in the content."""
    digests, file = Digests(tmp_path / "digests.json"), tmp_path / "file"
    for _ in range(50):
        file.write_bytes(b"abc")
        before = digests.file(file)
        in_place(file)
        assert digests.file(file) != before
    assert not (tmp_path / "digests.json").exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": {}}', "\udcff"])
def test_a_memory_that_is_none_is_forgotten(tmp_path: Path, content: str) -> None:
    memory, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_bytes(b"abc")
    memory.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert Digests(memory).file(file) == Digests().file(file)
    assert list(json.loads(memory.read_text()).values()) == [Digests().file(file)]


@pytest.mark.usefixtures("settled")
def test_what_is_remembered_is_no_digest_then_it_is_made(tmp_path: Path) -> None:
    memory, file = tmp_path / "digests.json", tmp_path / "file"
    file.write_bytes(b"abc")
    digest = Digests(memory).file(file)
    memory.write_text(json.dumps(dict.fromkeys(json.loads(memory.read_text()), 5)))
    assert Digests(memory).file(file) == digest


@pytest.mark.usefixtures("settled")
def test_a_memory_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    (tmp_path / "digests.json").mkdir()
    for memory in (tmp_path / "digests.json", file / "digests.json", tmp_path / "no" / "digests.json"):
        assert Digests(memory).file(file) == Digests().file(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digests.json", "file"]


def test_the_digest_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    (folder / "below").mkdir(parents=True)
    (folder / "a.yaml").write_text("task: a")
    (folder / "below" / "b.py").write_text("b = 1")
    seen = [Digests().path(folder)]

    def changed() -> bool:
        seen.append(Digests().path(folder))
        return seen[-1] not in seen[:-1]

    (folder / "a.yaml").rename(folder / "c.yaml")
    assert changed()
    (folder / "c.yaml").rename(folder / "below" / "c.yaml")
    assert changed()
    (folder / "below" / "b.py").write_text("b = 2")
    assert changed()
    (folder / "empty").write_text("")
    assert changed()
    (folder / "below" / "__pycache__").mkdir()
    (folder / "below" / "__pycache__" / "b.cpython-311.pyc").write_bytes(b"compiled")
    assert not changed(), "a run compiles a task's code"
    assert Digests().path(folder.rename(tmp_path / "elsewhere")) == seen[-1]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SqftError, match="gone cannot be read: No such file"):
        Digests().path(tmp_path / "gone")


def test_what_is_hidden_or_the_store_is_no_data(tmp_path: Path) -> None:
    """A data set's folder may hold the store, whose files sqft itself writes."""
    (tmp_path / "store").mkdir()
    (tmp_path / "train.jsonl").write_text("{}")
    digests = Digests(tmp_path / "store" / "digests.json")
    before = digests.path(tmp_path)
    (tmp_path / "store" / "more").write_text("more")
    (tmp_path / ".train.jsonl.swp").write_text("an editor's")
    assert digests.path(tmp_path) == before
    (tmp_path / "more.jsonl").write_text("{}")
    assert digests.path(tmp_path) != before
    inside = digests.path(tmp_path / "store")  # data below a store are data
    (tmp_path / "store" / "more").write_text("other")
    assert digests.path(tmp_path / "store") != inside
