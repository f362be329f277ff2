"""A disk that is full or may not be written: one message, status 2; the same command goes on once that is mended."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LARGE = 64 << 20


class Disk:
    """A file system of its own in memory."""

    def __init__(self, place: Path) -> None:
        self.place, self.store = place, place / "store"

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def leave(self, room: int) -> None:
        """Fill all but so many bytes."""
        free = shutil.disk_usage(self.place).free
        (self.place / "filler").write_bytes(b"\1" * max(0, free - room))

    def clear(self) -> None:
        (self.place / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    disk = Disk(place)
    disk.mount(f"size={LARGE}")
    yield disk
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    ("stage", "share"),
    [
        ("sparsify", 0.5),
        ("finetune", 0.1),
        *(
            pytest.param(stage, share, marks=pytest.mark.slow)
            for stage in ("sparsify", "quantize", "finetune", "search", "merge", "export", "evaluate")
            for share in (0.0, 0.4, 0.97)
        ),
    ],
)
def test_full(
    fork_server: Any, content: Any, disk: Disk, recipe: Path, tmp_path: Path, stage: str, share: float
) -> None:
    """The disk fills up while a stage works, with a share of what the stage needs still free."""
    stages = ["sparsify", "quantize", "finetune", "search", "merge", "export", "evaluate"]
    command = ["run", recipe, "--store", disk.store, "--until"]
    if before := stages[: stages.index(stage)]:
        assert fork_server.run(*command, before[-1]).status == 0
    whole = tmp_path / "whole"
    if before:
        shutil.copytree(disk.store, whole)
    undisturbed = fork_server.run("run", recipe, "--store", whole, "--until", stage)
    assert undisturbed.status == 0, undisturbed.said
    known = content(disk.store)
    (made,) = whole.glob(f"artifacts/{stage}-*")
    disk.leave(int(share * sum(-(-f.stat().st_size // 4096) * 4096 for f in made.rglob("*"))))
    ended = fork_server.run(*command, stage, blind=True)
    ended.assert_error(str(disk.store), "--store")
    assert content(disk.store) == known
    disk.clear()
    again = fork_server.run(*command, stage)
    assert again.status == 0, again.said
    assert content(disk.store) == content(whole)


def test_too_little_room_is_seen_before_anything_is_done(fork_server: Any, disk: Disk, recipe: Path) -> None:
    disk.leave(1 << 14)
    fork_server.run("run", recipe, "--store", disk.store).assert_error("needs about", "free; make room", "--store")
    assert not list(disk.store.glob("artifacts/*"))


def test_read_only(fork_server: Any, content: Any, disk: Disk, recipe: Path) -> None:
    command = ["run", recipe, "--store", disk.store]
    disk.mount(f"remount,ro,size={LARGE}")
    fork_server.run(*command).assert_error("cannot be written: Read-only file system", "--store")
    disk.mount(f"remount,rw,size={LARGE}")
    assert fork_server.run(*command, "--until", "sparsify").status == 0
    known = content(disk.store)
    disk.mount(f"remount,ro,size={LARGE}")
    plan = fork_server.run("plan", recipe, "--store", disk.store)
    assert plan.status == 0 and "reuse" in plan.said, plan.said
    for more in ([], ["--until", "sparsify"], ["--fresh", "sparsify"]):
        fork_server.run(*command, *more).assert_error("cannot be written: Read-only file system", "--store")
    assert content(disk.store) == known
    disk.mount(f"remount,rw,size={LARGE}")
    assert fork_server.run(*command).status == 0


@pytest.mark.parametrize("ready", [lambda disk: disk.leave(1 << 14), lambda disk: disk.mount("remount,ro,size=64m")])
def test_the_output(fork_server: Any, disk: Disk, recipe: Path, tmp_path: Path, ready: Callable[[Disk], None]) -> None:
    store = tmp_path / "store"
    command = ["run", recipe, "--store", store, "--until", "sparsify", "--output", disk.place / "model"]
    ready(disk)
    fork_server.run(*command).assert_error(
        f"--output {disk.place / 'model'} cannot be written", f"the result stays in {store}"
    )
    assert {file.name for file in disk.place.iterdir()} <= {"filler"}
    disk.mount(f"remount,rw,size={LARGE}")
    (disk.place / "filler").unlink(missing_ok=True)
    ended = fork_server.run(*command)
    assert ended.status == 0 and (disk.place / "model" / "model.safetensors").is_file(), ended.said
