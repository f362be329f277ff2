"""SIGTERM inside and outside `terminable`, in this process and in others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from threading import Thread

import pytest

from sqft.utils.termination import Terminated, terminable


@pytest.fixture(autouse=True)
def stays_default() -> Iterator[None]:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_ends_work_as_ctrl_c_does_once() -> None:
    cleaned = []
    with pytest.raises(KeyboardInterrupt) as raised, terminable(), terminable():
        try:
            terminate()
        finally:
            terminate()  # what is impatient sends two
            cleaned.append(True)
    assert raised.type is Terminated and cleaned


def test_a_program_keeps_its_own_handler() -> None:
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    try:
        with terminable():
            terminate()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen


def test_other_threads_and_several_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = []

    def inside() -> None:
        with terminable():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = Thread(target=inside)
    thread.start()
    thread.join()
    monkeypatch.setattr("sqft.utils.termination.is_one_of_several", lambda: True)
    inside()
    assert handlers == [signal.SIG_DFL] * 2


def test_outside_it_kills_as_ever() -> None:
    code = "import os; from sqft.utils.termination import terminable\nwith terminable(): pass\nos.kill(os.getpid(), 15)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM
