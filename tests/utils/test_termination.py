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


class Swallows:
    def __del__(self) -> None:
        terminate()  # python prints what a finalizer raises, and goes on


def test_one_that_is_swallowed_does_not_make_the_next_ones_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    monkeypatch.setattr("sqft.utils.termination.PATIENCE", 0.0)
    with pytest.raises(Terminated), terminable():
        swallows = Swallows()
        del swallows
        gone_on = True
        terminate()
    assert gone_on


def test_what_is_started_inside_can_be_ended_too() -> None:
    """A process that starts while this one is ending has SIGTERM as ever: no handler but Python's is inherited."""
    with pytest.raises(Terminated), terminable():
        try:
            terminate()
        finally:
            code = "import os, time; os.kill(os.getpid(), 15); time.sleep(20)"
            child = subprocess.run([sys.executable, "-c", code], check=False)
    assert child.returncode == -signal.SIGTERM


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
