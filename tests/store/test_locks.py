"""Locks: exclusive or shared, waited for or not, and free when their process has ended."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from sqft.store.locks import Locks

HOLD = """
import sys
from contextlib import nullcontext
from pathlib import Path
from sqft.store.locks import Locks
with Locks(Path(sys.argv[1]), nullcontext).hold("a", shared=sys.argv[2] == "shared"):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def locks(tmp_path: Path) -> Locks:
    return Locks(tmp_path / ".locks", nullcontext)


@contextmanager
def another_process(locks: Locks, how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock "a"."""
    command = [sys.executable, "-c", HOLD, str(locks.folder), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_an_exclusive_lock_is_held_by_one(locks: Locks) -> None:
    with another_process(locks, "exclusive") as process:
        assert locks.is_exclusive("a") and locks.is_held("a")
        for shared in (False, True):
            with locks.hold("a", wait=False, shared=shared) as free:
                assert not free
        with locks.hold("b", wait=False) as free:
            assert free, "every name is a lock of its own"
        process.kill()
        process.wait()
        assert not locks.is_held("a"), "the lock of a killed process is free"
        with locks.hold("a", wait=False) as free:
            assert free


def test_a_shared_lock_is_held_by_several(locks: Locks) -> None:
    with another_process(locks, "shared"):
        assert locks.is_held("a") and not locks.is_exclusive("a")
        with locks.hold("a", wait=False, shared=True) as free:
            assert free
        with locks.hold("a", wait=False) as free:
            assert not free


def test_it_says_once_that_it_waits(locks: Locks, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sqft")
    held = threading.Event()

    def wait() -> None:
        with locks.hold("a") as free:
            assert free
            held.set()

    with another_process(locks, "shared") as process:
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not held.wait(0.2)
        process.kill()
        waiting.join(60)
    assert held.is_set() and caplog.messages == ["another run works on a; waiting for it"]


def test_an_error_inside_frees_the_lock(locks: Locks) -> None:
    with pytest.raises(ZeroDivisionError), locks.hold("a"):
        raise ZeroDivisionError
    assert not locks.is_held("a")


def test_to_ask_makes_no_file(locks: Locks) -> None:
    assert not locks.is_held("a") and not locks.is_exclusive("a") and not locks.folder.exists()


def test_files_are_opened_where_errors_become_messages(tmp_path: Path) -> None:
    @contextmanager
    def writing() -> Iterator[None]:
        try:
            yield
        except OSError:
            raise RuntimeError("the store cannot be written") from None

    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="cannot be written"), Locks(tmp_path / "file" / ".locks", writing).hold("a"):
        pass
