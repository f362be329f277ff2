"""Files and folders are written completely or not at all, and errors of the file system are one line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sqft.utils.files import copy_folder, existing_parent, reason, sync, unreadable, write_json


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": [1, "é"]})
    write_json(file, {"b": 2})
    assert json.loads(file.read_text("utf-8")) == {"b": 2} and file.read_text().endswith("}\n")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync"])
def test_json_that_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    file = tmp_path / "a.json"
    write_json(file, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"sqft.utils.files.{failing}", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, 2)
    assert json.loads(file.read_text()) == 1 and list(tmp_path.iterdir()) == [file]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source" / "inner").mkdir(parents=True)
    (tmp_path / "source" / "inner" / "a").write_text("a")
    return tmp_path / "source"


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_is_copied(source: Path, tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "new" / "copy"
    if exists:
        target.mkdir(parents=True)
    copy_folder(source, target)
    assert (target / "inner" / "a").read_text() == "a"
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_a_folder_is_copied_to_where_a_link_points(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    copy_folder(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "inner" / "a").read_text() == "a"


def test_what_is_in_the_way_stays_and_no_copy_is_left(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        copy_folder(source, target)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "copy"}
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_a_copy_that_was_cut_off_does_not_stop_the_next(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".copy.partial").mkdir()
    (tmp_path / ".copy.partial" / "rest").write_text("")
    copy_folder(source, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["inner"]


def test_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b") == existing_parent(tmp_path) == tmp_path.resolve()


def test_what_is_in_a_folder_that_may_not_be_searched_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.stat

    def stat(path: Any, *more: Any, **how: Any) -> os.stat_result:
        if Path(path).parent.name == "closed":  # root may search everywhere
            raise PermissionError(13, "Permission denied")
        return real(path, *more, **how)

    (tmp_path / "closed" / "in").mkdir(parents=True)
    monkeypatch.setattr(os, "stat", stat)
    assert existing_parent(tmp_path / "closed" / "in") == tmp_path.resolve() / "closed"


def test_files_and_folders_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")
    sync(tmp_path / "a")
    sync(tmp_path)

    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)  # some network file systems cannot do it for folders
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "a")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EACCES, "Permission denied", "/x"), "Permission denied: /x"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ValueError("first\nsecond"), "first"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_as_one_line(error: Exception, line: str) -> None:
    assert reason(error) == line


def test_what_cannot_be_read_is_named() -> None:
    named, nameless = OSError(errno.ENOENT, "No such file", "/a/b"), OSError("odd")
    assert str(unreadable(named, Path("/a"))) == "/a/b cannot be read: No such file"
    assert str(unreadable(nameless, Path("/a"))) == "/a cannot be read: odd"
